"""add_rms_norm: sum = round(x + residual), normed = rms_norm(sum, weight), in one pass.

Backward: with dz = dnormed * weight and z = sum * rstd, both addends receive
    dx = dsum + rstd * (dz - z * mean(dz * z)),   and dweight = sum over rows of dnormed * round(z).
Only the sum and the weight are saved; the sum is the next residual, so it is alive anyway.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, Traits, define, kernel, rows_backend
from ..checks import floating, last_dim_contiguous, like, number, shape
from ..checks import weight as check_weight
from ..derivatives import Derivative, once, unusual
from ._flops import counted

define(
    "add_rms_norm",
    backends=(*CPU, "cuda", "triton"),
    traits=Traits(by_rows=True),
    fwd=(
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    ),
    bwd=(
        "(Tensor dnormed, Tensor? dsum, Tensor sum, Tensor weight, float eps) -> (Tensor, Tensor)",
        lambda dnormed, dsum, sum, weight, eps: (
            sum.new_empty(sum.shape),
            weight.new_empty(weight.shape),
        ),
    ),
)
counted("add_rms_norm")


class _AddRMSNorm(Derivative):
    op = "add_rms_norm"

    @staticmethod
    def forward(x, residual, weight, eps, backend):
        return kernel("add_rms_norm_fwd", backend)(x, residual, weight, eps)

    @staticmethod
    def keep(ctx, inputs, output):
        _, _, weight, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dnormed, dsum):
        total, weight = ctx.saved_tensors
        if dnormed is None:
            return dsum, dsum, None, None, None
        dsum = None if dsum is None else last_dim_contiguous(dsum)
        bwd = kernel("add_rms_norm_bwd", ctx.backend)
        dnormed = last_dim_contiguous(dnormed)
        dx, dweight = once("add_rms_norm", bwd, dnormed, dsum, total, weight, ctx.eps)
        return dx, dx, dweight, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Residual addition, then RMS normalization of the sum, as CoreNet rounds them.

    Args:
        x: [..., n] float32, bfloat16 or float16, any strides.
        residual: like x, what is added to it.
        weight: [n] in x's dtype or float32.
        eps: what is added to the mean of the squares.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        (normed, sum), each [..., n], contiguous, in x's dtype. Differentiable by x, residual and
        weight.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device.
        RuntimeError: the named backend can't run here.

    Example:
        >>> x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.ones(64)
        >>> normed, total = elmkernels.add_rms_norm(x, residual, weight)
        >>> torch.equal(total, x + residual)
        True
    """
    floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    like("residual", residual, "x", x)
    shape("residual", residual, x.shape)
    check_weight("weight", weight, x.shape[-1], "x", x)
    number("eps", eps)
    backend = rows_backend("add_rms_norm", backend, x, residual, weight)
    if backend == REFERENCE:
        return reference.add_rms_norm(x, residual, weight, eps)
    x, residual = last_dim_contiguous(x), last_dim_contiguous(residual)
    if unusual():
        return _AddRMSNorm.transformed(x, residual, weight, eps, backend)
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or weight.requires_grad
    ):
        return _AddRMSNorm.apply(x, residual, weight, eps, backend)
    return kernel("add_rms_norm_fwd", backend)(x, residual, weight, eps)
