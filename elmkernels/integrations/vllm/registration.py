"""What vLLM knows by the name "openelm", and what is refused before anything is loaded."""

from transformers import AutoConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

from . import shapes
from .configuration import ArchConvertor, OpenELMConfig
from .switch import CUSTOM_OPS

ARCHITECTURE = "OpenELMForCausalLM"


class Checks(VerifyAndUpdateConfig):
    """What vLLM asks of a model when its own configuration is complete."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse a folder that can't be served.

        Raises:
            ValueError: its weights aren't plain, or there is no tokenizer, with what to do.
        """
        refuse(shapes.missing_form(vars(model_config.hf_config), model_config.model))
        if not model_config.skip_tokenizer_init:
            refuse(shapes.missing_tokenizer(str(model_config.tokenizer or model_config.model)))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what the layers don't allow, and have this package's ops on.

        Raises:
            ValueError: layers, positions or a head's width don't fit, with what to do.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        shape = shapes.shape_of(vars(model.hf_config))
        refuse(shapes.missing_tensor_parallel(shape, parallel.tensor_parallel_size))
        refuse(shapes.missing_pipeline(shape, parallel.pipeline_parallel_size))
        refuse(shapes.missing_length(shape, model.max_model_len))
        refuse(missing_head_dim(shape.head_dim))
        switch_on(vllm_config.compilation_config.custom_ops)


def refuse(reason: str | None) -> None:
    """Raise ValueError with the reason, if there is one."""
    if reason is not None:
        raise ValueError(reason)


def missing_head_dim(head_dim: int) -> str | None:
    """Why vLLM's attention on a CPU can't take a head of that width: it fails at the first request
    only, and takes the engine with it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if not sizes or head_dim in sizes:
        return None
    return f"head_dim must be one of {', '.join(map(str, sizes))} on a CPU, got {head_dim}"


def switch_on(custom_ops: list[str]) -> None:
    """Add this package's ops to those that vLLM runs, unless it was told otherwise: by "none", or
    by an op's own name. vLLM's default for what it compiles is none.
    """
    if "none" in custom_ops:
        return
    named = {op[1:] for op in custom_ops}
    custom_ops += [f"+{name}" for name in CUSTOM_OPS if name not in named]


def register_all() -> None:
    """Register the configuration, its checks and the model; again is no error."""
    AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
    MODEL_ARCH_CONFIG_CONVERTORS["openelm"] = ArchConvertor
    MODELS_CONFIG_MAP[ARCHITECTURE] = Checks
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
