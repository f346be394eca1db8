"""The backward of attention, without atomics: one kernel owns rows of dq, another keys' dk and dv.

From the saved lse, with P = 2^(scale log2(e) q k^T - lse), zero where a key isn't seen:
    dV = P^T dO,  dS = P (dO V^T - delta),  delta = rowsum(dO O),  dQ = scale dS K,
    dK = scale dS^T Q.
P and dS are rounded to the inputs' dtype before they are multiplied, all sums are fp32. The first
kernel takes tiles of queries as the forward does, and leaves delta for the second, whose programs
walk over the rows, all heads of a group, that see a block of keys: first, masked, those at the
edge. So every sum has one owner and one order. Keys that no query sees get zeros.

Operations a query head: 6 head_dim in the first and 8 head_dim in the second for each pair of a
query and a key it sees, 14 to the forward's 4 (10 are the least: scores are computed twice, which
costs less than to add dq from many programs in memory). No configuration has been measured on a
GPU yet; the tables say so.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import (
    Block,
    load_rows,
    place,
    plan,
    real_keys,
    row_offsets,
    sight_of,
    store_rows,
    tiles_of,
)
from .common import AMD, NVIDIA, arch, guard, units, vec_of

_QUERIES = "reasoned: q, dout and the sum of a row stay in registers"
_KEYS = "reasoned: two sums a key stay in registers, fewer rows pass by"
_SHORT = "compiled: with 64 keys, sm_80 keeps no register, sm_90 spills"
_LARGE = "compiled: no spills; 128 KB of shared memory"
_FEW = "compiled: with 64 rows, 129 KB of shared memory, where consumer cards have 99"
_WIDE = "compiled: with 64 rows sm_90 spills registers"
_WIDE_AMD = "compiled: with 32 rows gfx942 spills registers"
_SINGLE = "compiled: without matrix units for float32 products are unrolled, and more spills"

# `tile` rows of queries and `keys` keys, of the kernel that owns queries and of that for keys.
BACKWARD_Q = {
    2: (
        Block(NVIDIA, 64, None, 128, 8, _QUERIES, keys=64, stages=2),
        Block(("sm_90",), 128, None, 128, 8, _LARGE, keys=64, stages=2),
        Block(NVIDIA, 128, None, 64, 4, _SHORT, keys=32, stages=2),
        Block(NVIDIA, None, None, 32, 8, _WIDE, keys=32, stages=1),
        Block(AMD, 64, None, 128, 4, _QUERIES, keys=64, stages=1),
        Block(AMD, 128, None, 64, 4, _QUERIES, keys=64, stages=1),
        Block(AMD, None, None, 32, 4, _QUERIES, keys=32, stages=1),
    ),
    4: (
        Block(NVIDIA, 64, None, 32, 8, _SINGLE, keys=32, stages=2),
        Block(NVIDIA, None, None, 16, 8, _SINGLE, keys=16, stages=2),
        Block(AMD, 128, None, 32, 4, _SINGLE, keys=32, stages=1),
        Block(AMD, None, None, 16, 4, _SINGLE, keys=16, stages=1),
    ),
}
BACKWARD_K = {
    2: (
        Block(NVIDIA, 64, None, 64, 8, _KEYS, keys=128, stages=2),
        Block(("sm_80", "sm_90"), 128, None, 64, 8, _KEYS, keys=64, stages=2),
        Block(NVIDIA, 128, None, 32, 8, _FEW, keys=64, stages=2),
        Block(NVIDIA, None, None, 32, 8, _KEYS, keys=32, stages=1),
        Block(AMD, 64, None, 64, 4, _KEYS, keys=64, stages=1),
        Block(AMD, 128, None, 32, 4, _KEYS, keys=64, stages=1),
        Block(AMD, None, None, 16, 4, _WIDE_AMD, keys=32, stages=1),
    ),
    4: (
        Block(NVIDIA, 64, None, 32, 8, _SINGLE, keys=32, stages=2),
        Block(NVIDIA, 128, None, 16, 8, _SINGLE, keys=32, stages=2),
        Block(NVIDIA, None, None, 16, 8, _SINGLE, keys=16, stages=2),
        Block(AMD, 128, None, 32, 4, _SINGLE, keys=32, stages=1),
        Block(AMD, None, None, 16, 4, _SINGLE, keys=16, stages=1),
    ),
}

_SIZES = ["lq", "lk", "pairs", "kv_heads", "documents"]
_STRIDES = ["g0", "g1", "g2", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2"]
_STRIDES += ["m0", "m1", "o0"]


@triton.jit
def _add_dq(
    q, dout, k, v, key_mask, acc, level, delta, n, end, limit, c, k1, v1, m1, EDGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one block of keys gives dq, without its scale."""
    at = tl.arange(0, BLOCK_N)
    if EDGE:
        there = real_keys(n, end, key_mask, m1, BLOCK_N)
        keys = load_rows(k + n * k1, at * k1, there, HEAD_DIM, BLOCK_D)
        values = load_rows(v + n * v1, at * v1, there, HEAD_DIM, BLOCK_D)
    else:
        keys = load_rows(k + n * k1, at * k1, None, HEAD_DIM, BLOCK_D)
        values = load_rows(v + n * v1, at * v1, None, HEAD_DIM, BLOCK_D)
    s = tl.dot(q, tl.trans(keys), input_precision="ieee")
    p = tl.exp2(s * c - level[:, None])
    if EDGE:
        p = tl.where(there[None, :] & ((n + at)[None, :] < limit[:, None]), p, 0.0)
    dp = tl.dot(dout, tl.trans(values), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit(do_not_specialize=[*_SIZES, "tiles", *_STRIDES, "c", "scale"])
def _bwd_q(
    dout, q, k, v, out, lse, key_mask, offsets, cu_seqlens, dq, delta,
    lq, lk, pairs, kv_heads, documents, tiles,
    g0, g1, g2, q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, o0, c, scale,
    GROUP: tl.constexpr, VEC: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = program % pairs
    tile = tiles - 1 - program // pairs
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    start, length, keys, first, tile = place(
        tile, batch, lq, lk, offsets, o0, cu_seqlens, documents, GROUP, BLOCK_M
    )
    row = tile * BLOCK_M
    if row >= length * GROUP:
        return
    g1 = g1.to(tl.int64) * VEC
    g2 = g2.to(tl.int64) * VEC
    q1 = q1.to(tl.int64) * VEC
    q2 = q2.to(tl.int64) * VEC
    k1 = k1.to(tl.int64) * VEC
    v1 = v1.to(tl.int64) * VEC
    dout += batch * g0 * VEC + start * g1 + head * GROUP * g2
    q += batch * q0 * VEC + start * q1 + head * GROUP * q2
    k += batch * k0 * VEC + start * k1 + head * k2 * VEC
    v += batch * v0 * VEC + start * v1 + head * v2 * VEC
    if key_mask is not None:
        m1 = m1.to(tl.int64)
        key_mask += batch * m0
    q_heads = kv_heads * GROUP
    out_at = ((batch * lq + start) * q_heads + head * GROUP) * HEAD_DIM
    lse_at = (batch * q_heads + head * GROUP) * lq + start
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < length * GROUP
    base, at = row_offsets(row, q1, q2, GROUP, BLOCK_M)
    queries = load_rows(q + base, at, live, HEAD_DIM, BLOCK_D)
    base, at = row_offsets(row, g1, g2, GROUP, BLOCK_M)
    slopes = load_rows(dout + base, at, live, HEAD_DIM, BLOCK_D)
    base, at = row_offsets(row, tl.cast(q_heads, tl.int64) * HEAD_DIM, HEAD_DIM, GROUP, BLOCK_M)
    found = load_rows(out + out_at + base, at, live, HEAD_DIM, BLOCK_D)
    dots = tl.sum(slopes.to(tl.float32) * found.to(tl.float32), 1)
    base, level_at = row_offsets(row, 1, tl.cast(lq, tl.int64), GROUP, BLOCK_M)
    level = tl.load(lse + lse_at + base + level_at, mask=live, other=0.0)
    tl.store(delta + lse_at + base + level_at, dots, mask=live)
    limit = first + 1 + tl.minimum(rows // GROUP, length - 1)
    end = tl.minimum(first + 1 + tl.minimum((row + BLOCK_M - 1) // GROUP, length - 1), keys)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    edge = 0
    if key_mask is None:
        edge = tl.maximum(tl.minimum(first + 1 + row // GROUP, end), 0) // BLOCK_N * BLOCK_N
        for n in range(0, edge, BLOCK_N):
            acc = _add_dq(
                queries, slopes, k, v, None, acc, level, dots, n, end, limit, c, k1, v1, m1,
                False, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
    for n in range(edge, end, BLOCK_N):
        acc = _add_dq(
            queries, slopes, k, v, key_mask, acc, level, dots, n, end, limit, c, k1, v1, m1,
            True, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    base, at = row_offsets(row, tl.cast(q_heads, tl.int64) * HEAD_DIM, HEAD_DIM, GROUP, BLOCK_M)
    store_rows(dq + out_at + base, at, acc * scale, live, HEAD_DIM, BLOCK_D)


@triton.jit
def _add_dk_dv(
    keys, values, q, dout, lse, delta, dk, dv, row, count, lq, there, n, first, c, q1, q2, g1, g2,
    EDGE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the rows from `row` on give a block of keys, all transposed: [keys, rows]."""
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < count
    base, at = row_offsets(row, q1, q2, GROUP, BLOCK_M)
    queries = load_rows(q + base, at, live, HEAD_DIM, BLOCK_D)
    base, at = row_offsets(row, g1, g2, GROUP, BLOCK_M)
    slopes = load_rows(dout + base, at, live, HEAD_DIM, BLOCK_D)
    base, at = row_offsets(row, 1, lq, GROUP, BLOCK_M)
    # Rows that aren't there weigh nothing.
    level = tl.load(lse + base + at, mask=live, other=float("inf"))
    dots = tl.load(delta + base + at, mask=live, other=0.0)
    s = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    p = tl.exp2(s * c - level[None, :])
    if EDGE:
        p = tl.where(there[:, None] & (n[:, None] <= (first + rows // GROUP)[None, :]), p, 0.0)
    dv = tl.dot(p.to(slopes.dtype), slopes, dv, input_precision="ieee")
    dp = tl.dot(values, tl.trans(slopes), input_precision="ieee")
    ds = p * (dp - dots[None, :])
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "c", "scale"])
def _bwd_k(
    dout, q, k, v, lse, delta, key_mask, offsets, cu_seqlens, dk, dv,
    lq, lk, pairs, kv_heads, documents,
    g0, g1, g2, q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, o0, c, scale,
    GROUP: tl.constexpr, VEC: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = program % pairs
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    # Most queries see the first keys: they go first.
    start, length, keys, first, tile = place(
        program // pairs, batch, lq, lk, offsets, o0, cu_seqlens, documents, 1, BLOCK_N
    )
    key = tile * BLOCK_N
    if key >= keys:
        return
    g1 = g1.to(tl.int64) * VEC
    g2 = g2.to(tl.int64) * VEC
    q1 = q1.to(tl.int64) * VEC
    q2 = q2.to(tl.int64) * VEC
    k1 = k1.to(tl.int64) * VEC
    v1 = v1.to(tl.int64) * VEC
    dout += batch * g0 * VEC + start * g1 + head * GROUP * g2
    q += batch * q0 * VEC + start * q1 + head * GROUP * q2
    k += batch * k0 * VEC + start * k1 + head * k2 * VEC + key * k1
    v += batch * v0 * VEC + start * v1 + head * v2 * VEC + key * v1
    if key_mask is not None:
        m1 = m1.to(tl.int64)
        key_mask += batch * m0
    q_heads = kv_heads * GROUP
    lse_at = (batch * q_heads + head * GROUP) * lq + start
    wide_lq = tl.cast(lq, tl.int64)
    n = key + tl.arange(0, BLOCK_N)
    there = real_keys(key, tl.minimum(first + length, keys), key_mask, m1, BLOCK_N)
    within = tl.arange(0, BLOCK_N)
    key_rows = load_rows(k, within * k1, there, HEAD_DIM, BLOCK_D)
    value_rows = load_rows(v, within * v1, there, HEAD_DIM, BLOCK_D)
    dk_rows = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_rows = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    count = length * GROUP
    # The rows from `begin` on see the first of these keys, those from `whole` on see all.
    begin = tl.minimum(tl.maximum(key - first, 0), length) * GROUP
    whole = count
    if key_mask is None:
        sees_all = tl.minimum(tl.maximum(key + BLOCK_N - 1 - first, 0), length) * GROUP
        whole = tl.minimum(begin + tl.cdiv(sees_all - begin, BLOCK_M) * BLOCK_M, count)
    for row in range(begin, whole, BLOCK_M):
        dk_rows, dv_rows = _add_dk_dv(
            key_rows, value_rows, q, dout, lse + lse_at, delta + lse_at, dk_rows, dv_rows, row,
            count, wide_lq, there, n, first, c, q1, q2, g1, g2,
            True, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    if key_mask is None:
        for row in range(whole, count, BLOCK_M):
            dk_rows, dv_rows = _add_dk_dv(
                key_rows, value_rows, q, dout, lse + lse_at, delta + lse_at, dk_rows, dv_rows, row,
                count, wide_lq, there, n, first, c, q1, q2, g1, g2,
                False, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    at = ((batch * lk + start + key) * kv_heads + head) * HEAD_DIM
    step = within.to(tl.int64) * kv_heads * HEAD_DIM
    store_rows(dk + at, step, dk_rows * scale, n < keys, HEAD_DIM, BLOCK_D)
    store_rows(dv + at, step, dv_rows, n < keys, HEAD_DIM, BLOCK_D)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    key_mask: Tensor | None, offsets: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, lq, q_heads, head_dim = q.shape
    lk, kv_heads = k.shape[1:3]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    group, pairs = q_heads // kv_heads, batch * kv_heads
    sight, mask_strides, documents = sight_of(key_mask, offsets, cu_seqlens)
    sizes = lq, lk, pairs, kv_heads, documents or 0
    vec = vec_of(head_dim, dout, q, k, v)
    strides = (*(s for t in (dout, q, k, v) for s in units(t, vec)), *mask_strides)
    scales = scale * math.log2(math.e), scale
    with guard(q):
        constants, block = plan(
            BACKWARD_Q[q.element_size()], head_dim, lq * group, arch(q.device)
        )  # fmt: skip
        tiles = tiles_of(lq * group, block.tile, documents)
        _bwd_q[(tiles * pairs,)](
            dout, q, k, v, out, lse, *sight, dq, delta, *sizes, tiles, *strides, *scales,
            GROUP=group, VEC=vec, **constants, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        constants, block = plan(
            BACKWARD_K[q.element_size()], head_dim, lq * group, arch(q.device)
        )  # fmt: skip
        tiles = tiles_of(lk, block.keys, documents)
        _bwd_k[(tiles * pairs,)](
            dout, q, k, v, lse, delta, *sight, dk, dv, *sizes, *strides, *scales,
            GROUP=group, VEC=vec, **constants, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
    return dq, dk, dv
