"""linear: y = x w^T for a weight that is plain, affine-quantised or packed (see `formats`).

Few rows of x (up to MAX_ROWS) are bound by memory: a streaming kernel reads each byte of the weight
once, as it is stored. More rows are bound by arithmetic: the product is torch's own, and of a
compressed weight a block of at most BLOCK_BYTES is dense at a time. A compressed weight takes no
gradient; x does: dx = dy w.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import reference
from ..backends import REFERENCE, choose, define, kernel
from ..checks import fail, floating, last_dim_packed, tensor
from ..formats import BITS, GROUP_SIZES, SEGMENT_BYTES, SEGMENT_COLUMNS, Affine, Packed, Weight

MAX_ROWS = 8
# Below what the C library maps anew, zeroed, at every call: page faults there cost more
# than a larger block gains.
BLOCK_BYTES = 16 << 20
PACKED_BITS = 12

_PARTS = (
    "Tensor data, Tensor? scales, Tensor? biases, Tensor? exponents, Tensor? escape_starts, "
    "Tensor? escape_columns, Tensor? escape_values"
)


def parts(weight: Weight) -> tuple:
    """A weight as the raw kernels take it: its tensors, and how many bits it has (0: plain)."""
    if isinstance(weight, Affine):
        return (weight.q, weight.scales, weight.biases, None, None, None, None, weight.bits)
    if isinstance(weight, Packed):
        escapes = (weight.escape_starts, weight.escape_columns, weight.escape_values)
        return (weight.data, None, None, weight.exponents, *escapes, PACKED_BITS)
    return (weight, None, None, None, None, None, None, 0)


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


def check_weight(name: str, weight: Weight) -> None:
    """The tensors of a weight fit each other."""
    if isinstance(weight, Affine):
        _check_affine(name, weight)
    elif isinstance(weight, Packed):
        _check_packed(name, weight)
    else:
        floating(name, weight)
        if weight.dim() != 2:
            fail(name, "[n, k]", list(weight.shape))


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device) -> None:
    tensor(name, x)
    if x.dtype != dtype:
        fail(name, dtype, x.dtype, TypeError)
    if tuple(x.shape) != tuple(shape):
        fail(name, list(shape), list(x.shape))
    if x.device != device:
        fail(name, f"on {device}", x.device)
    if not x.is_contiguous():
        fail(name, "contiguous", f"strides {x.stride()}")


def _check_affine(name: str, w: Affine) -> None:
    if w.bits not in BITS:
        fail(f"{name}.bits", " or ".join(map(str, BITS)), w.bits)
    if w.group_size not in GROUP_SIZES:
        fail(f"{name}.group_size", " or ".join(map(str, GROUP_SIZES)), w.group_size)
    tensor(f"{name}.q", w.q)
    if w.q.dim() != 2:
        fail(f"{name}.q", "[n, k bits / 32]", list(w.q.shape))
    n, k = w.shape
    if k % w.group_size:
        fail(f"{name}.q", f"of a multiple of {w.group_size} columns (group_size)", k)
    floating(f"{name}.scales", w.scales)
    _check(f"{name}.q", w.q, torch.uint32, w.q.shape, w.q.device)
    for part, x in (("scales", w.scales), ("biases", w.biases)):
        _check(f"{name}.{part}", x, w.scales.dtype, (n, k // w.group_size), w.q.device)


def _check_packed(name: str, w: Packed) -> None:
    tensor(f"{name}.data", w.data)
    n, segments = w.data.shape[0], -(-w.columns // SEGMENT_COLUMNS)
    device = w.data.device
    _check(f"{name}.data", w.data, torch.uint8, (n, segments, SEGMENT_BYTES), device)
    _check(f"{name}.exponents", w.exponents, torch.uint8, (16,), device)
    _check(f"{name}.escape_starts", w.escape_starts, torch.int32, (n + 1,), device)
    count = w.escape_columns.shape
    _check(f"{name}.escape_columns", w.escape_columns, torch.int32, count, device)
    _check(f"{name}.escape_values", w.escape_values, torch.bfloat16, count, device)


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


def rows_of(weight: Weight, begin: int, end: int) -> Weight:
    """Rows [begin, end) in the weight's own form."""
    if isinstance(weight, Affine):
        q, scales, biases = (t[begin:end] for t in (weight.q, weight.scales, weight.biases))
        return Affine(q, scales, biases, weight.bits, weight.group_size)
    if isinstance(weight, Packed):
        starts = weight.escape_starts[begin : end + 1]
        first, last = int(starts[0]), int(starts[-1])
        escapes = weight.escape_columns[first:last], weight.escape_values[first:last]
        data = weight.data[begin:end]
        return Packed(data, weight.exponents, starts - first, *escapes, weight.columns)
    return weight[begin:end]


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
    flat = x.reshape(-1, x.shape[-1])
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
        dx = None  # added up in float32: the blocks must not cost a rounding each
        for begin, end in blocks(ctx.weight, dy.dtype):
            block = dense_rows(ctx.weight, dy.dtype, begin, end, backend=ctx.backend)
            part = (dy[..., begin:end] @ block).float()
            dx = part if dx is None else dx.add_(part)
        dx = None if dx is None else dx.to(dy.dtype)
        return dx, None, None


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
