"""Kernels that are wrong in one thing: MUTATIONS = {op: {what is wrong: a function like the op}}.

Each computes what its op's reference does, forward and backward, but for one mistake that a kernel
could make and that changes little: of a rounding, of a sum's accuracy, at an edge, in a gradient.
"""

from collections.abc import Callable

from .of_products import ATTENTION, DECODE_STEP, LINEAR, LOSS
from .of_rows import ADD_NORM, HEADS, NORM, SWIGLU

MUTATIONS: dict[str, dict[str, Callable]] = {
    "rms_norm": NORM,
    "add_rms_norm": ADD_NORM,
    "qk_norm_rope": HEADS,
    "swiglu": SWIGLU,
    "attention": ATTENTION,
    "linear": LINEAR,
    "linear_cross_entropy": LOSS,
    "decode_step": DECODE_STEP,
}
