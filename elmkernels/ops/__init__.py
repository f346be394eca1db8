"""The public ops: each validates, chooses a backend and carries the gradient."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .decode_step import decode_step
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .swiglu import swiglu

# The list of ops, in the order in which tables have them.
__all__ = [
    "rms_norm",
    "add_rms_norm",
    "qk_norm_rope",
    "swiglu",
    "attention",
    "linear",
    "decode_step",
    "linear_cross_entropy",
]
