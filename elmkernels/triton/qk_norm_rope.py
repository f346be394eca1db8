"""qk_norm_rope: split the fused projection q | k | v, RMS-normalize q and k, rotate both.

For a head x of q or k: u = round(x * rstd) * weight (rounded again where the weight has x's dtype),
then on its halves (a, b), y = round(a cos - b sin), round(b cos + a sin), in fp32 between. Without
weights u = x. v is not read, except with a cache: then k and v go straight to their slots.

The heads of all tokens are one list of rows that programs cut into tiles, so that no head count
idles a lane; head counts are run-time integers. A position outside the table gives NaN and reads
nothing; a slot outside the cache is not written.

Backward rotates by the opposite angle, du = (dy_a cos + dy_b sin, dy_b cos - dy_a sin), then, with
z = x * rstd and dz = du * weight: dx = rstd * (dz - z * mean(dz * z)), dweight = sum of
du * round(z) over the heads of q or of k; dv is copied. Persistent programs keep one fp32 row of
each dweight; a second kernel adds those in a fixed order. The two rows go to memory and back: so a
program has at least LEAST_HEADS heads, and one that has all of them stores the dweights itself.

Bytes a token in a type of b bytes, each from memory once: forward 2 (q + kv) head_dim b (cached:
2 (q + 2 kv)), backward 3 (q + kv) head_dim b + 2 kv head_dim b; the table and the positions stay in
the caches. The floor is those bytes over the memory's bandwidth. Not measured on a GPU yet.
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
    sum_partials,
    units,
    vec_of,
)

_FEW = "reasoned: many one-warp programs, one or two 16-byte loads of each half a thread"
_MANY = "reasoned: 2048 elements a program, one 16-byte load of each half a thread"
_BIG = "reasoned: the smallest tile"
_LOOP = "reasoned: 1024 elements a tile in registers; executed: dweights' parts add 6% of traffic"

LEAST_HEADS = 48  # of a program of the backward: 16 bytes a column beside 288, in half types

# `width` is head_dim, `rows` the number of heads of all tokens.
FORWARD = (
    Tile(NVIDIA, 64, 4096, 8, 1, _FEW),
    Tile(NVIDIA, 128, 4096, 4, 1, _FEW),
    Tile(NVIDIA, 64, None, 32, 4, _MANY),
    Tile(NVIDIA, 128, None, 16, 4, _MANY),
    Tile(NVIDIA, 256, None, 8, 4, _MANY),
    Tile(NVIDIA, None, None, 1, 4, _BIG),
    Tile(AMD, 64, 4096, 16, 1, _FEW),
    Tile(AMD, 128, 4096, 8, 1, _FEW),
    Tile(AMD, 64, None, 32, 2, _MANY),
    Tile(AMD, 128, None, 16, 2, _MANY),
    Tile(AMD, 256, None, 8, 2, _MANY),
    Tile(AMD, None, None, 1, 4, _BIG),
)
BACKWARD = (
    Tile(NVIDIA, 64, None, 16, 4, _LOOP, per_sm=4),
    Tile(NVIDIA, 128, None, 8, 4, _LOOP, per_sm=4),
    Tile(NVIDIA, 256, None, 4, 4, _LOOP, per_sm=4),
    Tile(NVIDIA, None, None, 1, 4, _BIG, per_sm=2),
    Tile(AMD, 64, None, 16, 2, _LOOP, per_sm=4),
    Tile(AMD, 128, None, 8, 2, _LOOP, per_sm=4),
    Tile(AMD, 256, None, 4, 2, _LOOP, per_sm=4),
    Tile(AMD, None, None, 1, 4, _BIG, per_sm=2),
)


@lru_cache(maxsize=4096)
def plan(table: tuple[Tile, ...], head_dim: int, rows: int, arch: str) -> tuple[dict, Tile]:
    """The compile-time constants of a launch on heads, and the row of the table they are of."""
    tile = pick(table, arch, head_dim, rows)
    half = head_dim // 2
    return {"HALF": half, "BLOCK": triton.next_power_of_2(half), "ROWS": tile.tile}, tile


@triton.jit
def _place(first, heads, length, ROWS: tl.constexpr):
    """Rows from int64 `first` on: which head of which token. 64-bit divisions only for scalars."""
    token = first // heads
    local = (first % heads).to(tl.int32) + tl.arange(0, ROWS)
    at = (token % length).to(tl.int32) + local // heads
    return (
        (token // length + at // length)[:, None],
        (at % length)[:, None],
        (local % heads)[:, None],
    )


@triton.jit
def _angles(positions, p0, p1, batch, at, table, table_length, cols, wanted, HALF: tl.constexpr):
    """cos and sin of each row's position; NaN where it isn't wanted or isn't in the table."""
    position = tl.load(positions + batch * p0 + at.to(tl.int64) * p1, mask=wanted, other=-1)
    inside = (position >= 0) & (position < table_length) & (cols < HALF)
    table += position * (2 * HALF) + cols
    cos = tl.load(table, mask=inside, other=float("nan"))
    return cos, tl.load(table + HALF, mask=inside, other=float("nan"))


@triton.jit
def _halves(weight, cols, HALF: tl.constexpr):
    """A weight in fp32, as two halves."""
    a = tl.load(weight + cols, mask=cols < HALF, other=0.0).to(tl.float32)
    return a, tl.load(weight + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)


@triton.jit
def _store(out, a, b, cols, mask, HALF: tl.constexpr):
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + cols, a.to(dtype), mask=mask & (cols < HALF))
    tl.store(out + HALF + cols, b.to(dtype), mask=mask & (cols < HALF))


@triton.jit(
    do_not_specialize=[
        "rows", "heads", "length", "q_heads", "kv_heads", "table_length", "max_length",
        "x0", "x1", "p0", "p1", "s0", "s1", "k0", "k1", "k2", "v0", "v1", "v2",
    ],
)  # fmt: skip
def _fwd(
    qkv, q_weight, k_weight, positions, table, slots, q, k, v,
    rows, heads, length, q_heads, kv_heads, table_length, max_length,
    x0, x1, p0, p1, s0, s1, k0, k1, k2, v0, v1, v2, eps,
    NORM: tl.constexpr, CACHE: tl.constexpr, VEC: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = qkv.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    batch, at, head = _place(first, heads, length, ROWS)
    live = (first + tl.arange(0, ROWS) < rows)[:, None]
    is_q = live & (head < q_heads)
    is_k = live & (head >= q_heads) & (head < q_heads + kv_heads)
    cols = tl.arange(0, BLOCK)[None, :]
    qkv += (batch * x0 + at.to(tl.int64) * x1) * VEC + head.to(tl.int64) * (2 * HALF)
    raw_a = tl.load(qkv + cols, mask=live & (cols < HALF), other=0.0)
    raw_b = tl.load(qkv + HALF + cols, mask=live & (cols < HALF), other=0.0)
    cos, sin = _angles(
        positions, p0, p1, batch, at, table, table_length, cols, is_q | is_k, HALF
    )  # fmt: skip
    a = raw_a.to(tl.float32)
    b = raw_b.to(tl.float32)
    if NORM:
        rounded: tl.constexpr = q_weight.dtype.element_ty
        wq_a, wq_b = _halves(q_weight, cols, HALF)
        wk_a, wk_b = _halves(k_weight, cols, HALF)
        w_a = tl.where(is_q, wq_a, wk_a)
        w_b = tl.where(is_q, wq_b, wk_b)
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a = ((a * rstd).to(dtype).to(tl.float32) * w_a).to(rounded).to(tl.float32)
        b = ((b * rstd).to(dtype).to(tl.float32) * w_b).to(rounded).to(tl.float32)
    out_a = a * cos - b * sin
    out_b = b * cos + a * sin
    q += ((batch * length + at) * q_heads + head) * (2 * HALF)
    _store(q, out_a, out_b, cols, is_q, HALF)
    k_head = (head - q_heads).to(tl.int64)
    if CACHE:
        slot = tl.load(slots + batch * s0 + at.to(tl.int64) * s1, mask=live, other=-1)
        kept = (slot >= 0) & (slot < max_length)
        k += (batch * k0 + slot * k1 + k_head * k2) * VEC
        _store(k, out_a, out_b, cols, is_k & kept, HALF)
        v += (batch * v0 + slot * v1 + (k_head - kv_heads) * v2) * VEC
        _store(v, raw_a, raw_b, cols, live & (head >= q_heads + kv_heads) & kept, HALF)
    else:
        k += (batch * k0 + at.to(tl.int64) * k1 + k_head * k2) * VEC
        _store(k, out_a, out_b, cols, is_k, HALF)


def _launch_fwd(
    qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps, k, v=None, slots=None
) -> Tensor:
    """Launches the forward kernel on qkv's q and k (and v, into a cache); returns q."""
    batch, length = qkv.shape[:2]
    head_dim = table.shape[1]
    q = torch.empty(batch, length, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    heads = q_heads + (1 if v is None else 2) * kv_heads
    rows = batch * length * heads
    if rows == 0:
        return q
    constants, tile = plan(FORWARD, head_dim, rows, arch(qkv.device))
    vec = vec_of(head_dim, qkv, k) if v is None else vec_of(head_dim, qkv, k, v)
    norm = q_weight is not None
    with guard(qkv):
        _fwd[(triton.cdiv(rows, tile.tile),)](
            qkv, q_weight.contiguous() if norm else None, k_weight.contiguous() if norm else None,
            positions, table.contiguous(), slots, q, k, v,
            rows, heads, length, q_heads, kv_heads, table.shape[0], k.shape[1],
            *units(qkv, vec), *positions.stride(), *((0, 0) if v is None else slots.stride()),
            *units(k, vec), *((0, 0, 0) if v is None else units(v, vec)), eps,
            NORM=norm, CACHE=v is not None, VEC=vec, **constants, num_warps=tile.warps,
        )  # fmt: skip
    return q


def qk_norm_rope_fwd(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor,
    rope_table: Tensor, q_heads: int, kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*qkv.shape[:2], kv_heads, rope_table.shape[1])
    k = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    q = _launch_fwd(
        qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps, k
    )  # fmt: skip
    return q, k


def qk_norm_rope_cache(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor,
    rope_table: Tensor, q_heads: int, kv_heads: int, eps: float,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    return _launch_fwd(
        qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps,
        k_cache, v_cache, slots,
    )  # fmt: skip


@triton.jit
def _load_dy(dq, dk, dv, cols, is_q, is_k, is_v):
    """A half of each row's cotangent, from the one tensor of three that has it."""
    from_q = tl.load(dq + cols, mask=is_q, other=0.0).to(tl.float32)
    from_k = tl.load(dk + cols, mask=is_k, other=0.0).to(tl.float32)
    from_v = tl.load(dv + cols, mask=is_v, other=0.0).to(tl.float32)
    return tl.where(is_q, from_q, tl.where(is_k, from_k, from_v))


@triton.jit(
    do_not_specialize=[
        "rows", "heads", "length", "q_heads", "kv_heads", "table_length", "x0", "x1", "p0", "p1",
        "a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2",
    ],
)  # fmt: skip
def _bwd(
    dq, dk, dv, qkv, q_weight, k_weight, positions, table, dqkv, dq_partial, dk_partial,
    rows, heads, length, q_heads, kv_heads, table_length,
    x0, x1, p0, p1, a0, a1, a2, b0, b1, b2, c0, c1, c2, eps,
    NORM: tl.constexpr, VEC: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = qkv.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    if NORM:
        wq_a, wq_b = _halves(q_weight, cols, HALF)
        wk_a, wk_b = _halves(k_weight, cols, HALF)
        dwq_a = tl.zeros([ROWS, BLOCK], tl.float32)
        dwq_b = tl.zeros([ROWS, BLOCK], tl.float32)
        dwk_a = tl.zeros([ROWS, BLOCK], tl.float32)
        dwk_b = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tile * ROWS
        batch, at, head = _place(first, heads, length, ROWS)
        token = at.to(tl.int64)
        row = first + tl.arange(0, ROWS)[:, None]
        live = (row < rows) & (cols < HALF)
        is_q = live & (head < q_heads)
        is_k = live & (head >= q_heads) & (head < q_heads + kv_heads)
        is_v = live & (head >= q_heads + kv_heads)
        k_head = (head - q_heads).to(tl.int64)
        dq_row = dq + (batch * a0 + token * a1 + head.to(tl.int64) * a2) * VEC
        dk_row = dk + (batch * b0 + token * b1 + k_head * b2) * VEC
        dv_row = dv + (batch * c0 + token * c1 + (k_head - kv_heads) * c2) * VEC
        dy_a = _load_dy(dq_row, dk_row, dv_row, cols, is_q, is_k, is_v)
        dy_b = _load_dy(dq_row, dk_row, dv_row, HALF + cols, is_q, is_k, is_v)
        wanted = (row < rows) & (head < q_heads + kv_heads)
        cos, sin = _angles(positions, p0, p1, batch, at, table, table_length, cols, wanted, HALF)
        du_a = dy_a * cos + dy_b * sin
        du_b = dy_b * cos - dy_a * sin
        if NORM:
            x_row = qkv + (batch * x0 + token * x1) * VEC + head.to(tl.int64) * (2 * HALF)
            a = tl.load(x_row + cols, mask=is_q | is_k, other=0.0).to(tl.float32)
            b = tl.load(x_row + HALF + cols, mask=is_q | is_k, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
            a = a * rstd
            b = b * rstd
            dw_a = du_a * a.to(dtype).to(tl.float32)
            dw_b = du_b * b.to(dtype).to(tl.float32)
            dwq_a += tl.where(is_q, dw_a, 0.0)
            dwq_b += tl.where(is_q, dw_b, 0.0)
            dwk_a += tl.where(is_k, dw_a, 0.0)
            dwk_b += tl.where(is_k, dw_b, 0.0)
            dz_a = tl.where(is_q | is_k, du_a * tl.where(is_q, wq_a, wk_a), 0.0)
            dz_b = tl.where(is_q | is_k, du_b * tl.where(is_q, wq_b, wk_b), 0.0)
            mean = tl.sum(dz_a * a + dz_b * b, 1)[:, None] / (2 * HALF)
            du_a = rstd * (dz_a - a * mean)
            du_b = rstd * (dz_b - b * mean)
        out = dqkv + row * (2 * HALF)
        _store(out, tl.where(is_v, dy_a, du_a), tl.where(is_v, dy_b, du_b), cols, live, HALF)
    if NORM:
        dq_partial += program * (2 * HALF)
        dk_partial += program * (2 * HALF)
        _store(dq_partial, tl.sum(dwq_a, 0)[None, :], tl.sum(dwq_b, 0)[None, :], cols, True, HALF)
        _store(dk_partial, tl.sum(dwk_a, 0)[None, :], tl.sum(dwk_b, 0)[None, :], cols, True, HALF)


def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, positions: Tensor, rope_table: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    norm = q_weight is not None
    if qkv.numel() == 0:
        nothing = (torch.zeros_like(w) if norm else qkv.new_empty(0) for w in (q_weight, k_weight))
        return dqkv, *nothing
    q_heads, kv_heads, head_dim = dq.shape[2], dk.shape[2], dq.shape[3]
    heads = q_heads + 2 * kv_heads
    rows = qkv.shape[0] * qkv.shape[1] * heads
    constants, tile = plan(BACKWARD, head_dim, rows, arch(qkv.device))
    programs = persistent_programs(tile, rows, LEAST_HEADS if norm else 1, qkv.device)
    vec = vec_of(head_dim, qkv, dq, dk, dv)
    weights = (q_weight, k_weight)
    partials = [partials_of(programs, w) if norm else None for w in weights]
    with guard(qkv):
        _bwd[(programs,)](
            dq, dk, dv, qkv, q_weight.contiguous() if norm else None,
            k_weight.contiguous() if norm else None, positions, rope_table.contiguous(), dqkv,
            *partials, rows, heads, qkv.shape[1], q_heads, kv_heads, rope_table.shape[0],
            *units(qkv, vec), *positions.stride(),
            *units(dq, vec), *units(dk, vec), *units(dv, vec), eps,
            NORM=norm, VEC=vec, **constants, num_warps=tile.warps,
        )  # fmt: skip
        if not norm:
            return dqkv, qkv.new_empty(0), qkv.new_empty(0)
        return dqkv, *(sum_partials(p, w) for p, w in zip(partials, weights, strict=True))
