"""attention: out = softmax(scale q k^T) v over the keys a query sees, without any mask in memory.

A program holds a tile of queries, all heads of one group, and walks over the keys they see: first
those that all of them see, then, masked, those at the edge. Scores and softmax are fp32, in base 2
with the scale folded in; the weights are rounded to v's dtype before they meet it. lse is
log2(sum 2^(scale log2(e) q k)), -inf of a query that sees no key; its output is zeros. float32 is
multiplied in full, not as TF32.

Where the tiles are too few for the multiprocessors (a token after a long context) the keys of each
are split among programs whose fp32 results a second kernel adds, by their lse, in a fixed order.

Operations a query head: 4 head_dim for each pair of a query and a key it sees, of lq tokens after
`first` others lq (first + (lq + 1) / 2) pairs; the floor is those over the matrix units' speed.
Bytes, in a type of b: q and out once, 2 lq q_heads head_dim b; k and v once a tile of queries, 2 lk
kv_heads head_dim b, which with one tile, as in decoding, is the floor over the memory's bandwidth.
No configuration has been measured on a GPU yet; the table says so. The backward is in
_attention_bwd.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd import attention_bwd
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
from .common import AMD, NVIDIA, arch, guard, multiprocessors, units, vec_of

__all__ = ["attention_bwd", "attention_fwd"]

LEAST_KEYS = 128  # of a split: two turns of the loop, so that starting it is worth something
COMBINED_ROWS = 16

_TOKEN = "reasoned: the smallest tile of queries, and deep loads: the keys' bytes are all"
_FEW = "reasoned: a tile that few tokens fill"
_MANY = "reasoned: 128 rows, 32 a warp, read each key as seldom as registers allow"
_EIGHT = "compiled: with 4 warps sm_90 spills registers, on sm_100 they would only just do"
_SHORT = "compiled: with 64 keys sm_80 spills registers"
_CONSUMER = "compiled: 97 KB of shared memory, as consumer cards of this architecture have 99"
_WIDE = "reasoned: half the rows, as a row takes twice the registers"
_SINGLE = "compiled: without matrix units for float32 products are unrolled, and more spills"
_FIRST = ("sm_80",)

FORWARD = {
    2: (
        Block(NVIDIA, 64, 16, 16, 4, _TOKEN, keys=64, stages=4),
        Block(NVIDIA, 128, 16, 16, 4, _TOKEN, keys=64, stages=3),
        Block(NVIDIA, None, 16, 16, 4, _TOKEN, keys=16, stages=3),
        Block(NVIDIA, 64, 64, 64, 4, _FEW, keys=64, stages=2),
        Block(NVIDIA, 128, 64, 64, 4, _FEW, keys=32, stages=3),
        Block(_FIRST, 64, None, 128, 4, _MANY, keys=64, stages=3),
        Block(NVIDIA, 64, None, 128, 8, _EIGHT, keys=64, stages=3),
        Block(_FIRST, 128, None, 128, 8, _SHORT, keys=32, stages=3),
        Block(("sm_90",), 128, None, 128, 8, _MANY, keys=64, stages=3),
        Block(NVIDIA, 128, None, 128, 8, _CONSUMER, keys=64, stages=2),
        Block(NVIDIA, None, None, 64, 8, _WIDE, keys=32, stages=2),
        Block(AMD, 64, 16, 16, 4, _TOKEN, keys=64, stages=2),
        Block(AMD, 128, 16, 16, 4, _TOKEN, keys=64, stages=2),
        Block(AMD, None, 16, 16, 4, _TOKEN, keys=32, stages=2),
        Block(AMD, 64, 64, 64, 4, _FEW, keys=32, stages=2),
        Block(AMD, 128, None, 128, 4, _MANY, keys=64, stages=2),
        Block(AMD, None, None, 64, 4, _WIDE, keys=32, stages=1),
    ),
    4: (
        Block(NVIDIA, 64, 16, 16, 4, _TOKEN, keys=32, stages=2),
        Block(NVIDIA, 64, None, 64, 8, _SINGLE, keys=32, stages=2),
        Block(NVIDIA, 128, None, 32, 8, _SINGLE, keys=16, stages=2),
        Block(NVIDIA, None, None, 16, 8, _SINGLE, keys=16, stages=2),
        Block(AMD, 64, 16, 16, 4, _TOKEN, keys=32, stages=2),
        Block(AMD, 128, None, 64, 4, _SINGLE, keys=32, stages=1),
        Block(AMD, None, None, 16, 4, _SINGLE, keys=16, stages=1),
    ),
}


def splits_of(programs: int, rows: int, keys: int, processors: int) -> int:
    """Among how many programs the keys of each tile are split: until two run on each
    multiprocessor, while each has at least LEAST_KEYS, and so many for the rows of its key/value
    head that the fp32 partials stay half of the bytes of keys and values (in 16 bits)."""
    least = max(LEAST_KEYS, 4 * rows)
    return max(1, min(2 * processors // programs, keys // least))


@triton.jit
def _attend(
    q, k, v, key_mask, acc, top, total, n, end, limit, c, k1, v1, m1,
    EDGE: tl.constexpr, SOME_SEE_NOTHING: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys into the sums of each row; `top` is the largest score so far, in base 2."""
    at = tl.arange(0, BLOCK_N)
    if EDGE:
        there = real_keys(n, end, key_mask, m1, BLOCK_N)
        keys = load_rows(k + n * k1, at * k1, there, HEAD_DIM, BLOCK_D)
        values = load_rows(v + n * v1, at * v1, there, HEAD_DIM, BLOCK_D)
    else:
        keys = load_rows(k + n * k1, at * k1, None, HEAD_DIM, BLOCK_D)
        values = load_rows(v + n * v1, at * v1, None, HEAD_DIM, BLOCK_D)
    s = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if EDGE:
        s = tl.where(there[None, :] & ((n + at)[None, :] < limit[:, None]), s, float("-inf"))
    grown = tl.maximum(top, tl.max(s, 1) * c)
    shift = grown
    if SOME_SEE_NOTHING:
        shift = tl.where(grown == float("-inf"), 0.0, grown)
    p = tl.exp2(s * c - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return acc, grown, total


_SIZES = ["lq", "lk", "pairs", "kv_heads", "documents", "tiles", "splits"]
_STRIDES = ["q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "m0", "m1", "o0"]


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, "c"])
def _fwd(
    q, k, v, key_mask, offsets, cu_seqlens, out, lse,
    lq, lk, pairs, kv_heads, documents, tiles, splits,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, m0, m1, o0, c,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = program % pairs
    split = program // pairs % splits
    # The last tiles see most keys: they go first.
    tile = tiles - 1 - program // pairs // splits
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    start, length, keys, first, tile = place(
        tile, batch, lq, lk, offsets, o0, cu_seqlens, documents, GROUP, BLOCK_M
    )
    row = tile * BLOCK_M
    if row >= length * GROUP:
        return
    q1 = q1.to(tl.int64) * VEC
    q2 = q2.to(tl.int64) * VEC
    k1 = k1.to(tl.int64) * VEC
    v1 = v1.to(tl.int64) * VEC
    q += batch * q0 * VEC + start * q1 + head * GROUP * q2
    k += batch * k0 * VEC + start * k1 + head * k2 * VEC
    v += batch * v0 * VEC + start * v1 + head * v2 * VEC
    if key_mask is not None:
        m1 = m1.to(tl.int64)
        key_mask += batch * m0
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < length * GROUP
    base, at = row_offsets(row, q1, q2, GROUP, BLOCK_M)
    queries = load_rows(q + base, at, live, HEAD_DIM, BLOCK_D)
    limit = first + 1 + tl.minimum(rows // GROUP, length - 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The keys that some row of the tile sees, and those of them that all see.
    end = tl.minimum(first + 1 + tl.minimum((row + BLOCK_M - 1) // GROUP, length - 1), keys)
    begin = 0
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N
        begin = split * share
        end = tl.minimum(begin + share, end)
    edge = begin
    if key_mask is None:
        whole = tl.minimum(first + 1 + row // GROUP, end) - begin
        edge = begin + tl.maximum(whole, 0) // BLOCK_N * BLOCK_N
        for n in range(begin, edge, BLOCK_N):
            acc, top, total = _attend(
                queries, k, v, None, acc, top, total, n, end, limit, c, k1, v1, m1,
                False, False, HEAD_DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
    for n in range(edge, end, BLOCK_N):
        acc, top, total = _attend(
            queries, k, v, key_mask, acc, top, total, n, end, limit, c, k1, v1, m1,
            True, SPLIT or key_mask is not None, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    level = tl.where(seen, top + tl.log2(total), float("-inf"))
    q_heads = kv_heads * GROUP
    if SPLIT:
        # The partials of a split lie like out and lse, one split after another.
        before = split * (pairs // kv_heads).to(tl.int64) * lq * q_heads
        out += before * HEAD_DIM
        lse += before
    token = batch * lq + start
    base, at = row_offsets(row, tl.cast(q_heads, tl.int64) * HEAD_DIM, HEAD_DIM, GROUP, BLOCK_M)
    out += (token * q_heads + head * GROUP) * HEAD_DIM
    store_rows(out + base, at, acc, live, HEAD_DIM, BLOCK_D)
    base, at = row_offsets(row, 1, tl.cast(lq, tl.int64), GROUP, BLOCK_M)
    lse += (batch * q_heads + head * GROUP) * lq + start
    tl.store(lse + base + at, level, mask=live)


@triton.jit(do_not_specialize=["rows", "lq", "q_heads", "splits"])
def _combine(
    partial, levels, out, lse, rows, lq, q_heads, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The results of the splits, weighted by 2^lse, for rows [batch, lq, q_heads]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token = row // q_heads
    level_at = (token // lq * q_heads + row % q_heads) * lq + token % lq
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for split in range(splits):
        before = tl.cast(rows, tl.int64) * split
        level = tl.load(levels + before + level_at, mask=live, other=float("-inf"))
        grown = tl.maximum(top, level)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        fade = tl.exp2(top - shift)
        weight = tl.exp2(level - shift)
        part = load_rows(partial + before * HEAD_DIM, row * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        acc = acc * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = grown
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    store_rows(out, row * HEAD_DIM, acc, live, HEAD_DIM, BLOCK_D)
    tl.store(lse + level_at, tl.where(seen, top + tl.log2(total), float("-inf")), mask=live)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, offsets: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, lq, q_heads, head_dim = q.shape
    lk, kv_heads = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, q_heads, lq, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group, pairs = q_heads // kv_heads, batch * kv_heads
    rows = lq * group
    constants, block = plan(FORWARD[q.element_size()], head_dim, rows, arch(q.device))
    sight, strides, documents = sight_of(key_mask, offsets, cu_seqlens)
    tiles = tiles_of(rows, block.tile, documents)
    splits = 1
    if documents is None:
        splits = splits_of(tiles * pairs, rows, lk, multiprocessors(q.device))
    to = out, lse
    if splits > 1:
        to = tuple(torch.empty(splits, *t.shape, dtype=torch.float32, device=q.device) for t in to)
    vec = vec_of(head_dim, q, k, v)
    with guard(q):
        _fwd[(tiles * splits * pairs,)](
            q, k, v, *sight, *to, lq, lk, pairs, kv_heads, documents or 0, tiles, splits,
            *units(q, vec), *units(k, vec), *units(v, vec), *strides, scale * math.log2(math.e),
            SPLIT=splits > 1, GROUP=group, VEC=vec, **constants,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        if splits > 1:
            count = batch * lq * q_heads
            _combine[(triton.cdiv(count, COMBINED_ROWS),)](
                *to, out, lse, count, lq, q_heads, splits, HEAD_DIM=head_dim,
                BLOCK_D=constants["BLOCK_D"], ROWS=COMBINED_ROWS, num_warps=4,
            )  # fmt: skip
    return out, lse
