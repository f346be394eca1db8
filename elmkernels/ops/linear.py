"""linear: y = x w^T for a weight that is plain, affine-quantised or packed (see `formats`).

Few rows of x (up to MAX_ROWS) are bound by memory: a streaming kernel reads each byte of the weight
once, as it is stored. More rows are bound by arithmetic: the product is torch's own, and of a
compressed weight a block of at most BLOCK_BYTES is dense at a time. A compressed weight takes no
gradient; x does: dx = dy w.
"""

from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import reference
from ..backends import REFERENCE, choose, define, kernel
from ..checks import fail, floating, last_dim_packed
from ..formats import Affine, Packed, Weight
from ..weights import check_weight, parts, rows_of

MAX_ROWS = 8
# Below what the C library maps anew, zeroed, at every call: page faults there cost more
# than a larger block gains.
BLOCK_BYTES = 16 << 20

_PARTS = (
    "Tensor data, Tensor? scales, Tensor? biases, Tensor? exponents, Tensor? escape_starts, "
    "Tensor? escape_columns, Tensor? escape_values"
)

define(
    "linear",
    fwd=(
        f"(Tensor x, {_PARTS}, int bits) -> Tensor",
        lambda x, data, *_: x.new_empty((*x.shape[:-1], data.shape[0])),
    ),
    dense=(
        f"(Tensor like, {_PARTS}, int bits, int k, int begin, int end) -> Tensor",
        lambda like, *rest: like.new_empty((rest[-1] - rest[-2], rest[-3])),
    ),
)


def _block(weight: Weight, like: Tensor, begin: int, end: int, backend: str) -> Tensor:
    *tensors, bits = parts(weight)
    dense = kernel("linear_dense", backend)
    return dense(like, *tensors, bits, weight.shape[1], begin, end)


def dense_rows(
    weight: Weight, dtype: torch.dtype, begin: int, end: int, *, backend: str | None = None
) -> Tensor:
    """Rows [begin, end) of the dense matrix that a weight stands for, [end - begin, k]."""
    if isinstance(weight, Tensor):
        return weight[begin:end].to(dtype)
    backend = choose("linear", weight.device.type, backend)
    kernel_dtype = torch.bfloat16 if isinstance(weight, Packed) else dtype
    if backend == REFERENCE or kernel_dtype == torch.float64:
        return reference.dense(rows_of(weight, begin, end), dtype)
    like = torch.empty(0, dtype=kernel_dtype, device=weight.device)
    return _block(weight, like, begin, end, backend).to(dtype)


def blocks(weight: Weight, dtype: torch.dtype) -> list[tuple[int, int]]:
    """The rows of a weight in runs that take at most BLOCK_BYTES when they are dense."""
    n, k = weight.shape
    step = max(1, BLOCK_BYTES // max(1, k * dtype.itemsize))
    return list(pairwise([*range(0, n, step), n]))


def _product(x: Tensor, weight: Weight, backend: str) -> Tensor:
    """x w^T, the compressed weight being dense one block at a time."""
    found = blocks(weight, x.dtype)
    if len(found) == 1:
        return F.linear(x, dense_rows(weight, x.dtype, *found[0], backend=backend))
    flat = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    y = x.new_empty((flat.shape[0], weight.shape[0]))
    for begin, end in found:
        block = dense_rows(weight, x.dtype, begin, end, backend=backend)
        torch.mm(flat, block.t(), out=y[:, begin:end])
    return y.view(*x.shape[:-1], weight.shape[0])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, backend):
        ctx.weight, ctx.backend = weight, backend
        return _product(x, weight, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # Added up in float32: the blocks must not cost a rounding each.
        dx = dy.new_zeros((*dy.shape[:-1], ctx.weight.shape[1]), dtype=torch.float32)
        for begin, end in blocks(ctx.weight, dy.dtype):
            block = dense_rows(ctx.weight, dy.dtype, begin, end, backend=ctx.backend)
            dx += dy[..., begin:end] @ block
        return dx.to(dy.dtype), None, None


def linear(x: Tensor, weight: Weight, *, backend: str | None = None) -> Tensor:
    """Product with a weight in any form.

    x: [..., k] float32, bfloat16 or float16, any strides. weight: a tensor [n, k] of x's dtype, an
    `Affine` (scales in any of the dtypes) or a `Packed` (x must be bfloat16).
    Returns [..., n], contiguous, in x's dtype; sums are float32.
    Raises TypeError or ValueError for a wrong argument, RuntimeError for a backend that can't run.
    """
    floating("x", x)
    check_weight("weight", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        fail("x", f"[..., {weight.shape[1]}] like weight's columns", list(x.shape))
    if not isinstance(weight, Affine) and weight.dtype != x.dtype:
        fail("weight", f"{x.dtype} like x", weight.dtype, TypeError)
    if weight.device != x.device:
        fail("weight", f"on {x.device} like x", weight.device)
    backend = choose("linear", x.device.type, backend)
    plain = isinstance(weight, Tensor)
    wants = torch.is_grad_enabled() and (x.requires_grad or (plain and weight.requires_grad))
    if backend == REFERENCE:
        return reference.linear(x, weight)
    rows = x.numel() // max(1, x.shape[-1])
    if wants or rows > MAX_ROWS or x.numel() == 0 or weight.shape[0] == 0:
        if plain:
            return F.linear(x, weight)
        if wants:
            return _FrozenLinear.apply(x, weight, backend)
        return _product(x, weight, backend)
    if plain:
        weight = last_dim_packed(weight)
    return kernel("linear_fwd", backend)(last_dim_packed(x), *parts(weight))
