"""rms_norm: y = round(x * rstd) * weight, rstd = (mean(x^2) + eps)^-1/2 over the last dimension.

Backward, with z = x * rstd and dz = dy * weight:
    dx = rstd * (dz - z * mean(dz * z)),   dweight = sum over rows of dy * round(z).
Nothing but x and the weight is saved: a backward kernel reads the row anyway and recomputes rstd.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, Traits, define, kernel, rows_backend
from ..checks import floating, last_dim_contiguous, number
from ..checks import weight as check_weight
from ..derivatives import Derivative, once, unusual
from ._flops import counted

define(
    "rms_norm",
    backends=(*CPU, "cuda", "triton"),
    traits=Traits(by_rows=True),
    fwd=(
        "(Tensor x, Tensor weight, float eps) -> Tensor",
        lambda x, weight, eps: x.new_empty(x.shape),
    ),
    bwd=(
        "(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
        lambda dy, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    ),
)
counted("rms_norm")


class _RMSNorm(Derivative):
    op = "rms_norm"

    @staticmethod
    def forward(x, weight, eps, backend):
        return kernel("rms_norm_fwd", backend)(x, weight, eps)

    @staticmethod
    def keep(ctx, inputs, output):
        x, weight, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        bwd = kernel("rms_norm_bwd", ctx.backend)
        dx, dweight = once("rms_norm", bwd, last_dim_contiguous(dy), *ctx.saved_tensors, ctx.eps)
        return dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """RMS normalization over the last dimension, as CoreNet's `rms_norm.py` rounds it.

    Args:
        x: [..., n] float32, bfloat16 or float16, any strides; a last dimension whose stride isn't 1
            is copied.
        weight: [n] in x's dtype or float32; torch.ones(n) for a norm that has none.
        eps: what is added to the mean of the squares.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        [..., n], contiguous, in x's dtype. Differentiable by x and weight.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device.
        RuntimeError: the named backend can't run here.

    Example:
        >>> x, weight = torch.randn(2, 3, 64), torch.ones(64)
        >>> elmkernels.rms_norm(x, weight).shape
        torch.Size([2, 3, 64])
    """
    floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    check_weight("weight", weight, x.shape[-1], "x", x)
    number("eps", eps)
    backend = rows_backend("rms_norm", backend, x, weight)
    if backend == REFERENCE:
        return reference.rms_norm(x, weight, eps)
    x = last_dim_contiguous(x)
    if unusual():
        return _RMSNorm.transformed(x, weight, eps, backend)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, backend)
    return kernel("rms_norm_fwd", backend)(x, weight, eps)
