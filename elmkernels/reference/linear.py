"""y = x w^T for a weight in any of its forms; `dense` says what a compressed form stands for.

Before it maybe a norm, after it maybe SwiGLU or an addition, each rounded as on its own. With
`activations="int8"` the product is that of x', whose rows are rounded to 8 bits (`int8_rows`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.formats import Weight, form_of
from .rms_norm import rms_norm
from .swiglu import swiglu as gated

INT8_GROUP = 32  # columns of x that share a scale: every group of an affine weight holds some


def dense(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [n, k] that a weight stands for, in `dtype` (None: its own)."""
    return form_of(weight).dense(dtype)


def int8_rows(x: Tensor) -> Tensor:
    """x' [..., k] in x's dtype: of every 32 columns, in float32, with ties to even,

        scale = max |x| / 127;  q = round(x (1 / scale));  x' = scale q

    and x' = 0 where scale is below the smallest normal float32. All 32 are NaN if one is inf or
    NaN. A product of x' with an affine weight is, for each group, one of integers.
    """
    groups = x.float().unflatten(-1, (-1, INT8_GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups * torch.where(scale < torch.finfo(torch.float32).tiny, 0, 1 / scale)).round()
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (scale.to(wide) * q.to(wide)).flatten(-2).to(x.dtype)


def linear(
    x: Tensor, weight: Weight, norm: Tensor | None = None, eps: float = 1e-6,
    swiglu: bool = False, residual: Tensor | None = None, activations: str | None = None,
) -> Tensor:  # fmt: skip
    """x [..., k], weight [n, k] in any form -> [..., n] (swiglu: n / 2) in x's dtype; activations:
    "int8" rounds what meets an affine weight."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if activations is not None and form_of(weight).takes_int8:
        x = int8_rows(x)
    y = F.linear(x, dense(weight, x.dtype))
    if swiglu:
        y = gated(y)
    return y if residual is None else residual + y
