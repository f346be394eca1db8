"""OpenELM in vLLM: `vllm serve FOLDER` on this package's kernels, as a plugin.

    pip install elmkernels vllm
    vllm serve OpenELM-270M

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its
processes. `shapes` and `weights` say what differs from layer to layer, without vLLM; all else
here is imported where vLLM is.
"""

from .versions import TESTED

__all__ = ["TESTED", "register"]


def register() -> None:
    """Make vLLM know OpenELM's configuration and model; again is no error.

    With a vLLM whose interfaces are others nothing is registered and the log says why: a plugin
    must not keep other models from being served.
    """
    from vllm.logger import init_logger

    from .versions import missing_interfaces, warning

    log = init_logger("vllm.elmkernels")  # vLLM shows what is below its own name
    if missing := missing_interfaces():
        log.error("elmkernels: OpenELM is not registered: %s", missing)
        return
    if said := warning():
        log.warning_once(said)
    from .registration import register_all

    register_all()
