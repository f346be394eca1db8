"""y = x w^T for a weight in any of its forms; `dense` says what a compressed form stands for.

Before it maybe a norm, after it maybe SwiGLU or an addition, each rounded as on its own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.formats import SEGMENT_COLUMNS, Affine, Packed12, Weight
from .rms_norm import rms_norm
from .swiglu import swiglu as gated


def dense(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [n, k] that a weight stands for, in `dtype` (None: its own)."""
    if isinstance(weight, Affine):
        weight = _affine(weight, dtype)
    elif isinstance(weight, Packed12):
        weight = _packed(weight)
    return weight if dtype is None else weight.to(dtype)


def _affine(w: Affine, dtype: torch.dtype | None) -> Tensor:
    """scales q + biases in float32 (float64 if asked for), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    words = w.q.view(torch.int32)
    shifts = torch.arange(0, 32, w.bits, dtype=torch.int32, device=words.device)
    q = (words[..., None] >> shifts) & (2**w.bits - 1)
    groups = q.flatten(1).unflatten(1, (-1, w.group_size)).to(wide)
    exact = w.scales.to(wide)[..., None] * groups + w.biases.to(wide)[..., None]
    return exact.flatten(1).to(dtype or w.dtype)


def _packed(w: Packed12) -> Tensor:
    n, segments, _ = w.data.shape
    bytes_, codes = w.data.int().split((SEGMENT_COLUMNS, SEGMENT_COLUMNS // 2), dim=-1)
    codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    exponent = w.exponents.int()[codes.long()]
    bits = (bytes_ & 0x80) << 8 | exponent << 7 | bytes_ & 0x7F
    # Of each 64 bytes, those of the even groups of 8 are columns 0..31, the others 32..63.
    bits = bits.view(n, 2 * segments, 4, 2, 8).transpose(2, 3).flatten(1)
    found = bits.to(torch.uint16).view(torch.bfloat16)[:, : w.columns].clone()
    rows = torch.arange(n, device=bits.device).repeat_interleave(w.escape_starts.diff().long())
    found[rows, w.escape_columns.long()] = w.escape_values
    return found


def linear(
    x: Tensor, weight: Weight, norm: Tensor | None = None, eps: float = 1e-6,
    swiglu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., k], weight [n, k] in any form -> [..., n] (swiglu: n / 2) in x's dtype."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = F.linear(x, dense(weight, x.dtype))
    if swiglu:
        y = gated(y)
    return y if residual is None else residual + y
