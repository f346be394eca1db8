"""Which versions of vLLM this was run with, and what another one lacks."""

import importlib

from ...backends import Reason

TESTED = ("0.32.0",)
# What is asked of vLLM beside the modules that every model uses.
_INTERFACES = {
    "vllm.transformers_utils.model_arch_config_convertor": "MODEL_ARCH_CONFIG_CONVERTORS",
    "vllm.model_executor.models.config": "MODELS_CONFIG_MAP",
    "vllm.model_executor.models": "ModelRegistry",
}


def found() -> str:
    """The version of the vLLM that is here, without what it was built for."""
    import vllm

    return str(getattr(vllm, "__version__", "unknown")).partition("+")[0]


def warning(version: str | None = None) -> str | None:
    """What is said of a version that was not run; None of one that was.

    Args:
        version: of vLLM; None for the one that is here.
    """
    version = found() if version is None else version
    if version in TESTED:
        return None
    return f"elmkernels: OpenELM was run with vLLM {' and '.join(TESTED)}, this is {version}"


def missing_interfaces() -> Reason | None:
    """What this vLLM lacks of what registration needs, None if nothing."""
    for module, name in _INTERFACES.items():
        try:
            there = hasattr(importlib.import_module(module), name)
        except ImportError:
            there = False
        if not there:
            return (
                f"vLLM {found()} has no {module}.{name}, vLLM {' and '.join(TESTED)} has it: "
                f"pip install vllm=={TESTED[-1]}"
            )
    return None
