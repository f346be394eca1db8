"""linear where the product is torch's own: of a compressed weight a block is dense at a time."""

from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backends import REFERENCE, choose, kernel, optional_kernel
from ..checks import last_dim_contiguous
from ..derivatives import Derivative, once
from ..weights.formats import Parts, Weight, form_of

# Below what the C library maps anew, zeroed, at every call: page faults there cost more
# than a larger block gains.
BLOCK_BYTES = 16 << 20


def _block(weight: Weight, like: Tensor, begin: int, end: int, backend: str) -> Tensor:
    dense = kernel("linear_dense", backend)
    return dense(like, *form_of(weight).parts(), weight.shape[1], begin, end)


def dense_rows(
    weight: Weight, dtype: torch.dtype, begin: int, end: int, *, backend: str | None = None
) -> Tensor:
    """Rows [begin, end) of the dense matrix that a weight stands for, [end - begin, k]."""
    if isinstance(weight, Tensor):
        return weight[begin:end].to(dtype)
    backend = choose("linear", weight.device.type, backend)
    kernel_dtype = weight.native_dtype or dtype
    if backend == REFERENCE or kernel_dtype == torch.float64:
        return reference.dense(weight.rows(begin, end), dtype)
    like = torch.empty(0, dtype=kernel_dtype, device=weight.device)
    return _block(weight, like, begin, end, backend).to(dtype)


def blocks(weight: Weight, dtype: torch.dtype) -> list[tuple[int, int]]:
    """The rows of a weight in runs that take at most BLOCK_BYTES when they are dense."""
    n, k = weight.shape
    step = max(1, BLOCK_BYTES // max(1, k * dtype.itemsize))
    return list(pairwise([*range(0, n, step), n]))


def streamed_parts(weight: Weight) -> Parts:
    """What a streaming kernel takes: of a plain weight with contiguous rows."""
    return form_of(last_dim_contiguous(weight) if isinstance(weight, Tensor) else weight).parts()


def torch_product(x: Tensor, weight: Weight, wants: bool, special: bool, backend: str) -> Tensor:
    """x w^T; whether a gradient is asked for, and whether by one of torch.func's transforms."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    if special:
        return FrozenLinear.transformed(x, weight, backend)
    return FrozenLinear.apply(x, weight, backend) if wants else dense_product(x, weight, backend)


def dense_product(x: Tensor, weight: Weight, backend: str) -> Tensor:
    """x w^T, the compressed weight being dense one block at a time."""
    many = optional_kernel("linear_many", backend)
    # A packed12 weight keeps the bits of the plain one, whose product is torch's.
    if many and x.dtype == torch.bfloat16 and getattr(weight, "native_dtype", None) is None:
        return many(last_dim_contiguous(x), *form_of(weight).parts())
    found = blocks(weight, x.dtype)
    if len(found) == 1:
        return F.linear(x, dense_rows(weight, x.dtype, *found[0], backend=backend))
    flat = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    y = x.new_empty((flat.shape[0], weight.shape[0]))
    for begin, end in found:
        block = dense_rows(weight, x.dtype, begin, end, backend=backend)
        torch.mm(flat, block.t(), out=y[:, begin:end])
    return y.view(*x.shape[:-1], weight.shape[0])


class FrozenLinear(Derivative):
    """x w^T of a compressed weight, differentiable in x."""

    op = "linear"

    @staticmethod
    def forward(x, weight, backend):
        return dense_product(x, weight, backend)

    @staticmethod
    def keep(ctx, inputs, output):
        _, ctx.weight, ctx.backend = inputs

    @staticmethod
    def backward(ctx, dy):
        return once("linear", dense_gradient, dy, ctx.weight, ctx.backend), None, None


def dense_gradient(dy: Tensor, weight: Weight, backend: str) -> Tensor:
    """dy w, added up in float32: the blocks must not cost a rounding each."""
    dx = dy.new_zeros((*dy.shape[:-1], weight.shape[1]), dtype=torch.float32)
    for begin, end in blocks(weight, dy.dtype):
        dx += dy[..., begin:end] @ dense_rows(weight, dy.dtype, begin, end, backend=backend)
    return dx.to(dy.dtype)
