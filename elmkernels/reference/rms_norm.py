"""y = round(x * rsqrt(mean(x^2) + eps)) * weight, with round() to the dtype of x.

The statistics are taken in float32 (float64 for float64 inputs); the normalized row is rounded
to the input's dtype *before* it meets the weight, as in CoreNet's `rms_norm.py`.
"""

import torch
from torch import Tensor


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, computed wide and rounded to the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., n], weight [n] in x's dtype or float32 -> [..., n] in x's dtype."""
    return (normalize(x, eps) * weight).to(x.dtype)
