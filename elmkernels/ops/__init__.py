"""The public ops: each validates, chooses a backend and carries the gradient."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .decode_step import decode_step
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "decode_step",
    "linear",
    "linear_cross_entropy",
    "qk_norm_rope",
    "rms_norm",
    "swiglu",
]
