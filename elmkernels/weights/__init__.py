"""A dense matrix to each compressed form of `formats`; `reference.dense` is the way back."""

from .affine import check_scheme, quantize_weight
from .chunks import each_chunk
from .packed12 import check_packed12, count_exponents, pack_weight

__all__ = [
    "check_packed12",
    "check_scheme",
    "count_exponents",
    "each_chunk",
    "pack_weight",
    "quantize_weight",
]
