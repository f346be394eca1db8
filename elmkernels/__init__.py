"""elmkernels: Apple's OpenELM language models on fused kernels, proved against the reference."""

from . import reference
from .acceleration.projections import Plan
from .acceleration.swap import accelerate, restore
from .compression.packing import pack, unpack
from .compression.quantization import quantize
from .generation.session import generate
from .openelm import OpenELM, OpenELMConfig
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
    "Plan",
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
