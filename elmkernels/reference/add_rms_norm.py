"""sum = round(x + residual); normed = rms_norm(sum, weight): the step between two sublayers."""

from torch import Tensor

from .rms_norm import rms_norm


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x, residual [..., n] of one dtype, weight [n] -> (normed, sum), both [..., n]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
