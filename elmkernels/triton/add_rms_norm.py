"""add_rms_norm: sum = round(x + residual), normed = rms_norm(sum, weight), in one pass.

The statistics are those of the rounded sum. A row lives in registers as in rms_norm.py, whose
backward kernel is this op's too: it takes dsum as the gradient that the sum has from elsewhere,
    dx = dsum + rstd * (dz - z * mean(dz * z)),   dweight = sum over rows of dnormed * round(z).

Bytes a row of n in a type of b bytes, each from memory once: forward 4nb (two read, two written),
backward 4nb (3nb without dsum), plus 8n a program, if there are several, for dweight. The floor is
those bytes over the memory's bandwidth. No configuration has been measured on a GPU yet; the table
says so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AMD, NVIDIA, Tile, arch, guard, row_offset, rows_of
from .rms_norm import norm_bwd, plan

_NARROW = "reasoned: 2048 elements a program, 16 a thread"
_FEW = "reasoned: one 16-byte load of each input a thread, for the shortest way through one row"
_MANY = "reasoned: few warps a row, many rows in flight on a multiprocessor"

FORWARD = (
    Tile(NVIDIA, 64, None, 32, 4, _NARROW),
    Tile(NVIDIA, 128, None, 16, 4, _NARROW),
    Tile(NVIDIA, 256, None, 8, 4, _NARROW),
    Tile(NVIDIA, 512, None, 4, 4, _NARROW),
    Tile(NVIDIA, 2047, 512, 1, 4, _FEW),
    Tile(NVIDIA, 4095, 512, 1, 8, _FEW),
    Tile(NVIDIA, 2047, None, 1, 2, _MANY),
    Tile(NVIDIA, 4095, None, 1, 4, _MANY),
    Tile(NVIDIA, None, None, 1, 8, _FEW),
    Tile(AMD, 64, None, 32, 2, _NARROW),
    Tile(AMD, 128, None, 16, 2, _NARROW),
    Tile(AMD, 256, None, 8, 2, _NARROW),
    Tile(AMD, 512, None, 4, 2, _NARROW),
    Tile(AMD, 2047, None, 1, 2, _FEW),
    Tile(AMD, 4095, None, 1, 4, _FEW),
    Tile(AMD, None, None, 1, 4, _FEW),
)


@triton.jit(
    do_not_specialize=["rows", "n", "d1", "d2", "a0", "a1", "a2", "b0", "b1", "b2"],
)
def _fwd(
    x, residual, weight, normed, total, rows, n, d1, d2, a0, a1, a2, b0, b1, b2, eps,
    VEC: tl.constexpr, RANK: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    n = n * VEC
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < rows)[:, None]
    x += row_offset(row, d1, d2, a0, a1, a2, VEC, RANK)[:, None]
    residual += row_offset(row, d1, d2, b0, b1, b2, VEC, RANK)[:, None]
    normed += (row * n)[:, None]
    total += (row * n)[:, None]
    cols = tl.arange(0, HEAD)[None, :]
    head = _sum(x, residual, total, cols, live, dtype)
    squares = tl.sum(head * head, 1)
    if TAIL:
        tail_cols = HEAD + tl.arange(0, TAIL)[None, :]
        in_row = tail_cols < HEAD + TAIL if EXACT else tail_cols < n
        tail = _sum(x, residual, total, tail_cols, live & in_row, dtype)
        squares += tl.sum(tail * tail, 1)
    if WIDE:
        for first in range(HEAD + TAIL, n, HEAD):
            rest = _sum(x, residual, total, first + cols, live & (first + cols < n), dtype)
            squares += tl.sum(rest * rest, 1)
    rstd = tl.rsqrt(squares / n + eps)[:, None]
    w = tl.load(weight + cols).to(tl.float32)
    tl.store(normed + cols, ((head * rstd).to(dtype).to(tl.float32) * w).to(dtype), mask=live)
    if TAIL:
        w = tl.load(weight + tail_cols, mask=in_row, other=0.0).to(tl.float32)
        out = ((tail * rstd).to(dtype).to(tl.float32) * w).to(dtype)
        tl.store(normed + tail_cols, out, mask=live & in_row)
    if WIDE:
        for first in range(HEAD + TAIL, n, HEAD):
            in_row = first + cols < n
            rest = _sum(x, residual, total, first + cols, live & in_row, dtype)
            w = tl.load(weight + first + cols, mask=in_row, other=0.0).to(tl.float32)
            out = ((rest * rstd).to(dtype).to(tl.float32) * w).to(dtype)
            tl.store(normed + first + cols, out, mask=live & in_row)


@triton.jit
def _sum(x, residual, total, cols, mask, dtype: tl.constexpr):
    """round(x + residual), stored and returned in fp32."""
    a = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(residual + cols, mask=mask, other=0.0).to(tl.float32)
    rounded = (a + b).to(dtype)
    tl.store(total + cols, rounded, mask=mask)
    return rounded.to(tl.float32)


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return normed, total
    n = x.shape[-1]
    r = rows_of(x, residual, multiple=n)
    constants, tile = plan(FORWARD, n, r.count, arch(x.device))
    with guard(x):
        _fwd[(triton.cdiv(r.count, tile.tile),)](
            *r.tensors, weight.contiguous(), normed, total, r.count, n // r.vec, *r.sizes,
            *r.strides[0], *r.strides[1], eps,
            VEC=r.vec, RANK=r.rank, **constants, num_warps=tile.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return normed, total


def add_rms_norm_bwd(
    dnormed: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return norm_bwd(dnormed, total, dsum, weight, eps)
