"""rms_norm: y = round(x * rstd) * weight, rstd = (mean(x^2) + eps)^-1/2 over the last dimension.

fp32 inside; the normalized row is rounded to x's dtype before it meets the weight. A row lives in
registers as two blocks that are powers of two, HEAD + TAIL: 1280 = 1024 + 256, 1536 = 1024 + 512,
2048, 3072 = 2048 + 1024 are exact, where the next power of two would idle up to 37% of the lanes.
Columns past 2 x MAX_HEAD are looped over and read twice (no OpenELM width is).

Backward, with z = x * rstd and dz = dy * weight:
    dx = rstd * (dz - z * mean(dz * z)) (+ extra),   dweight = sum over rows of dy * round(z).
Persistent programs keep one fp32 row of dweight each; a second kernel adds those in a fixed order.
That row goes to memory and back, and each program reads the weight: so a program has LEAST_ROWS
rows or more, whose bytes are ten times those, and one that has all rows stores dweight itself.

No product is fused into a sum: of a sum of two lanes each lane would round the other's product
alone, and lanes that share a row would disagree about it, with whichever stores last being right.

Forward each program reads the weight again, half as much as its row: from the first cache.

Bytes a row of n in a type of b bytes, each from memory once: forward 2nb, backward 3nb (+ nb with
extra), plus 8n a program, if there are several, for dweight. The floor is those bytes over the
memory's bandwidth. No configuration has been measured on a GPU yet; the table says so.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    AMD,
    NVIDIA,
    Tile,
    arch,
    guard,
    partials_of,
    persistent_programs,
    pick,
    row_offset,
    rows_of,
    sum_partials,
)

MAX_HEAD = 2048
LEAST_ROWS = 20  # of a program of the backward: 10n bytes beside 120n, in half types

_NARROW = "reasoned: 2048 elements a program, 16 a thread"
_FEW = "reasoned: one 16-byte load a thread, for the shortest way through one row"
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

_SHORT = "compiled: 1024 elements a tile; with 2048, float32 spills registers on sm_100"
_LOOP = "reasoned: 8 to 16 warps on a multiprocessor, each with 16 to 24 columns of three tensors"
_FEWER = "reasoned: programs are few, so each is wide; executed: dweight's parts add 7% of traffic"

BACKWARD = (
    Tile(NVIDIA, 64, None, 16, 4, _SHORT, per_sm=4),
    Tile(NVIDIA, 128, None, 8, 4, _SHORT, per_sm=4),
    Tile(NVIDIA, 256, None, 4, 4, _SHORT, per_sm=4),
    Tile(NVIDIA, 512, None, 2, 4, _SHORT, per_sm=4),
    Tile(NVIDIA, 2047, 8192, 4, 16, _FEWER, per_sm=1),
    Tile(NVIDIA, 4095, 8192, 2, 16, _FEWER, per_sm=1),
    Tile(NVIDIA, 2047, None, 1, 4, _LOOP, per_sm=4),
    Tile(NVIDIA, 4095, None, 1, 8, _LOOP, per_sm=2),
    Tile(NVIDIA, None, None, 1, 16, _LOOP, per_sm=1),
    Tile(AMD, 64, None, 16, 2, _SHORT, per_sm=4),
    Tile(AMD, 128, None, 8, 2, _SHORT, per_sm=4),
    Tile(AMD, 256, None, 4, 2, _SHORT, per_sm=4),
    Tile(AMD, 512, None, 2, 2, _SHORT, per_sm=4),
    Tile(AMD, 2047, 8192, 4, 8, _FEWER, per_sm=1),
    Tile(AMD, 4095, 8192, 2, 8, _FEWER, per_sm=1),
    Tile(AMD, 2047, None, 1, 2, _LOOP, per_sm=4),
    Tile(AMD, 4095, None, 1, 4, _LOOP, per_sm=2),
    Tile(AMD, None, None, 1, 8, _LOOP, per_sm=1),
)


def blocks(n: int) -> dict[str, int | bool]:
    """HEAD is the largest power of two in n, TAIL the smallest that holds the rest (0: none)."""
    head = min(1 << (n.bit_length() - 1), MAX_HEAD)
    tail = min(triton.next_power_of_2(n - head), head) if n > head else 0
    return {"HEAD": head, "TAIL": tail, "EXACT": head + tail <= n, "WIDE": n > head + tail}


@lru_cache(maxsize=4096)
def plan(table: tuple[Tile, ...], n: int, rows: int, arch: str) -> tuple[dict, Tile]:
    """The compile-time constants of a launch on rows of n, and the row of the table they are of."""
    tile = pick(table, arch, n, rows)
    return {**blocks(n), "ROWS": tile.tile}, tile


_SIZES = ["rows", "n", "d1", "d2"]


@triton.jit(do_not_specialize=[*_SIZES, "s0", "s1", "s2"])
def _fwd(
    x, weight, y, rows, n, d1, d2, s0, s1, s2, eps,
    VEC: tl.constexpr, RANK: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    n = n * VEC
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < rows)[:, None]
    x += row_offset(row, d1, d2, s0, s1, s2, VEC, RANK)[:, None]
    y += (row * n)[:, None]
    cols = tl.arange(0, HEAD)[None, :]
    head = tl.load(x + cols, mask=live, other=0.0).to(tl.float32)
    squares = tl.sum(head * head, 1)
    if TAIL:
        tail_cols = HEAD + tl.arange(0, TAIL)[None, :]
        in_row = tail_cols < HEAD + TAIL if EXACT else tail_cols < n
        tail = tl.load(x + tail_cols, mask=live & in_row, other=0.0).to(tl.float32)
        squares += tl.sum(tail * tail, 1)
    if WIDE:
        for first in range(HEAD + TAIL, n, HEAD):
            rest = tl.load(x + first + cols, mask=live & (first + cols < n), other=0.0)
            squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1)
    rstd = tl.rsqrt(squares / n + eps)[:, None]
    w = tl.load(weight + cols).to(tl.float32)
    tl.store(y + cols, ((head * rstd).to(dtype).to(tl.float32) * w).to(dtype), mask=live)
    if TAIL:
        w = tl.load(weight + tail_cols, mask=in_row, other=0.0).to(tl.float32)
        out = ((tail * rstd).to(dtype).to(tl.float32) * w).to(dtype)
        tl.store(y + tail_cols, out, mask=live & in_row)
    if WIDE:
        for first in range(HEAD + TAIL, n, HEAD):
            in_row = first + cols < n
            rest = tl.load(x + first + cols, mask=live & in_row, other=0.0).to(tl.float32)
            w = tl.load(weight + first + cols, mask=in_row, other=0.0).to(tl.float32)
            out = ((rest * rstd).to(dtype).to(tl.float32) * w).to(dtype)
            tl.store(y + first + cols, out, mask=live & in_row)


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    n = x.shape[-1]
    r = rows_of(x, multiple=n)
    constants, tile = plan(FORWARD, n, r.count, arch(x.device))
    with guard(x):
        _fwd[(triton.cdiv(r.count, tile.tile),)](
            r.tensors[0], weight.contiguous(), y, r.count, n // r.vec, *r.sizes, *r.strides[0], eps,
            VEC=r.vec, RANK=r.rank, **constants, num_warps=tile.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y


@triton.jit(
    do_not_specialize=[*_SIZES, "a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"],
)
def _bwd(
    dy, x, extra, weight, dx, partial, rows, n, d1, d2, a0, a1, a2, b0, b1, b2, c0, c1, c2, eps,
    EXTRA: tl.constexpr, VEC: tl.constexpr, RANK: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    n = n * VEC
    program = tl.program_id(0).to(tl.int64)
    partial += program * n
    cols = tl.arange(0, HEAD)[None, :]
    w = tl.load(weight + cols).to(tl.float32)
    dw = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL:
        tail_cols = HEAD + tl.arange(0, TAIL)[None, :]
        in_row = tail_cols < HEAD + TAIL if EXACT else tail_cols < n
        tail_w = tl.load(weight + tail_cols, mask=in_row, other=0.0).to(tl.float32)
        tail_dw = tl.zeros([ROWS, TAIL], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        live = (row < rows)[:, None]
        dy_row = dy + row_offset(row, d1, d2, a0, a1, a2, VEC, RANK)[:, None]
        x_row = x + row_offset(row, d1, d2, b0, b1, b2, VEC, RANK)[:, None]
        extra_row = extra + row_offset(row, d1, d2, c0, c1, c2, VEC, RANK)[:, None]
        dx_row = dx + (row * n)[:, None]
        head = tl.load(x_row + cols, mask=live, other=0.0).to(tl.float32)
        head_dy = tl.load(dy_row + cols, mask=live, other=0.0).to(tl.float32)
        squares = tl.sum(head * head, 1)
        dots = tl.sum(head_dy * w * head, 1)
        if TAIL:
            tail = tl.load(x_row + tail_cols, mask=live & in_row, other=0.0).to(tl.float32)
            tail_dy = tl.load(dy_row + tail_cols, mask=live & in_row, other=0.0).to(tl.float32)
            squares += tl.sum(tail * tail, 1)
            dots += tl.sum(tail_dy * tail_w * tail, 1)
        if WIDE:
            for first in range(HEAD + TAIL, n, HEAD):
                rest_live = live & (first + cols < n)
                rest = tl.load(x_row + first + cols, mask=rest_live, other=0.0).to(tl.float32)
                rest_dy = tl.load(dy_row + first + cols, mask=rest_live, other=0.0).to(tl.float32)
                rest_w = tl.load(weight + first + cols, mask=first + cols < n, other=0.0)
                squares += tl.sum(rest * rest, 1)
                dots += tl.sum(rest_dy * rest_w.to(tl.float32) * rest, 1)
        rstd = tl.rsqrt(squares / n + eps)[:, None]
        mean = dots[:, None] * rstd / n
        z = head * rstd
        dw += head_dy * z.to(dtype).to(tl.float32)
        out = rstd * (head_dy * w - z * mean)
        if EXTRA:
            out += tl.load(extra_row + cols, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_row + cols, out.to(dtype), mask=live)
        if TAIL:
            z = tail * rstd
            tail_dw += tail_dy * z.to(dtype).to(tl.float32)
            out = rstd * (tail_dy * tail_w - z * mean)
            if EXTRA:
                out += tl.load(extra_row + tail_cols, mask=live & in_row, other=0.0).to(tl.float32)
            tl.store(dx_row + tail_cols, out.to(dtype), mask=live & in_row)
        if WIDE:
            # These columns' sums stay in the program's own row of `partial`, which starts as zeros.
            for first in range(HEAD + TAIL, n, HEAD):
                rest_live = live & (first + cols < n)
                rest = tl.load(x_row + first + cols, mask=rest_live, other=0.0).to(tl.float32)
                rest_dy = tl.load(dy_row + first + cols, mask=rest_live, other=0.0).to(tl.float32)
                rest_w = tl.load(weight + first + cols, mask=first + cols < n, other=0.0)
                z = rest * rstd
                sums = tl.load(partial + first + cols, mask=first + cols < n, other=0.0)
                tl.store(
                    partial + first + cols,
                    sums + tl.sum(rest_dy * z.to(dtype).to(tl.float32), 0)[None, :],
                    mask=first + cols < n,
                )
                out = rstd * (rest_dy * rest_w.to(tl.float32) - z * mean)
                if EXTRA:
                    added = tl.load(extra_row + first + cols, mask=rest_live, other=0.0)
                    out += added.to(tl.float32)
                tl.store(dx_row + first + cols, out.to(dtype), mask=rest_live)
            tl.debug_barrier()
    tl.store(partial + cols, tl.sum(dw, 0)[None, :])
    if TAIL:
        tl.store(partial + tail_cols, tl.sum(tail_dw, 0)[None, :], mask=in_row)


def norm_bwd(
    dy: Tensor, x: Tensor, extra: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """rms_norm's gradients, with `extra`, the gradient that x has from elsewhere, added to dx."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    n = x.shape[-1]
    r = rows_of(dy, x, x if extra is None else extra, multiple=n)
    constants, tile = plan(BACKWARD, n, r.count, arch(x.device))
    programs = persistent_programs(tile, r.count, LEAST_ROWS, x.device)
    partial = partials_of(programs, weight, added=constants["WIDE"])
    with guard(x):
        _bwd[(programs,)](
            *r.tensors, weight.contiguous(), dx, partial, r.count, n // r.vec, *r.sizes,
            *r.strides[0], *r.strides[1], *r.strides[2], eps,
            EXTRA=extra is not None, VEC=r.vec, RANK=r.rank, **constants, num_warps=tile.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        return dx, sum_partials(partial, weight)


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return norm_bwd(dy, x, None, weight, eps)
