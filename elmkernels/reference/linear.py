"""y = x w^T for a weight in any of its forms; `dense` says what a compressed form stands for.

Before it maybe a norm, after it maybe SwiGLU or an addition, each rounded as on its own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weights.formats import Weight, form_of
from .rms_norm import rms_norm
from .swiglu import swiglu as gated


def dense(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [n, k] that a weight stands for, in `dtype` (None: its own)."""
    return form_of(weight).dense(dtype)


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
