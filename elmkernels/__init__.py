"""elmkernels: Apple's OpenELM language models on fused kernels, proved against the reference."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    needs = "elmkernels needs torch >= 2.10, which is not installed: pip install torch"
    raise ImportError(needs, name="torch") from None

from . import reference
from .openelm import (
    OpenELM,
    OpenELMConfig,
    accelerate,
    generate,
    pack,
    quantize,
    restore,
    unpack,
)
from .ops import (
    add_rms_norm,
    attention,
    decode_step,
    linear,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    swiglu,
)
from .reference import rope_table

__version__ = "0.1.0"

__all__ = [
    "OpenELM",
    "OpenELMConfig",
    "accelerate",
    "add_rms_norm",
    "attention",
    "decode_step",
    "generate",
    "linear",
    "linear_cross_entropy",
    "pack",
    "qk_norm_rope",
    "quantize",
    "reference",
    "restore",
    "rms_norm",
    "rope_table",
    "swiglu",
    "unpack",
]
