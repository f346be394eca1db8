"""The specification of every op in plain eager PyTorch: any floating dtype, differentiable."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .decode_step import decode_step
from .linear import INT8_GROUP, dense, int8_rows, linear
from .linear_cross_entropy import cross_entropy, linear_cross_entropy
from .qk_norm_rope import qk_norm_rope, rope_table
from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = [
    "INT8_GROUP",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "decode_step",
    "dense",
    "int8_rows",
    "linear",
    "linear_cross_entropy",
    "qk_norm_rope",
    "rms_norm",
    "rope_table",
    "swiglu",
]
