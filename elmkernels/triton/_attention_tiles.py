"""What attention's kernels share: the choice of a tile, where a tile lies, how rows are loaded.

The query heads that share a key/value head share the rows of a tile: row r is head
r % GROUP of token r // GROUP, so that a key read once serves the whole group, and any group and
any number of tokens fill tiles to the last one. A tile never holds rows of two documents.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, pick


@dataclass(frozen=True, eq=False)
class Block(Tile):
    """A row of attention's tables. `width` is the head_dim, padded, and `rows` the rows of one
    key/value head that it is for; a program takes `tile` rows and `keys` keys at a time, with
    `stages` of them in flight."""

    keys: int = 64
    stages: int = 2


# One table for each element size, as shared memory and registers are counted in bytes.
Tables = dict[int, tuple[Block, ...]]


@lru_cache(maxsize=4096)
def plan(table: tuple[Block, ...], head_dim: int, rows: int, arch: str) -> tuple[dict, Block]:
    """The compile-time constants of a launch, and the row of the table that they are of."""
    width = max(16, triton.next_power_of_2(head_dim))
    block = pick(table, arch, width, rows)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": width, "BLOCK_M": block.tile, "BLOCK_N": block.keys}
    return sizes, block


def tiles_of(units: int, block: int, documents: int | None) -> int:
    """How many tiles of `block` cover that many rows or keys. Where documents share them, each may
    end within a tile; `place` gives document d those from cu_seqlens[d] // block + d on."""
    return triton.cdiv(units, block) if documents is None else units // block + documents


@triton.jit
def place(
    tile, batch, lq, lk, offsets, o0, cu_seqlens, documents,
    EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(start, lq, lk, first, tile) of what a tile is of: where its row or document starts among
    the tokens (int64), its lengths, how many keys come before its first query, which of its own
    tiles it is. EACH: how many of a tile's BLOCK one token takes. Nothing that documents or
    offsets say leads out of the tensors.
    """
    if cu_seqlens is not None:
        low = tile * 0
        high = low + documents - 1
        while low < high:
            middle = (low + high + 1) // 2
            begins = tl.load(cu_seqlens + middle) * EACH // BLOCK + middle
            high = tl.where(begins <= tile, high, middle - 1)
            low = tl.where(begins <= tile, middle, low)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + low), 0), lq)
        end = tl.minimum(tl.load(cu_seqlens + low + 1), lq)
        length = tl.maximum(end - start, 0).to(tl.int32)
        return start, length, length, 0, (tile - start * EACH // BLOCK - low).to(tl.int32)
    else:
        if offsets is not None:
            first = tl.load(offsets + batch * o0).to(tl.int32)
        else:
            first = lk - lq
        return (tile * 0).to(tl.int64), lq, lk, first, tile


@triton.jit
def row_offsets(first, s1, s2, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Where the rows from `first` on lie, in a tensor of int64 strides s1 between tokens and s2
    between heads. Of whole tokens a tile's own part is the same in every turn of a loop.
    """
    if BLOCK % GROUP == 0:
        local = tl.arange(0, BLOCK)
    else:
        local = first % GROUP + tl.arange(0, BLOCK)
    return (first // GROUP) * s1, (local // GROUP) * s1 + (local % GROUP) * s2


@triton.jit
def load_rows(x, offsets, there, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] from x + offsets on, zeros beyond HEAD_DIM and where `there` (None: all
    are) says that there is no row."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    at = x + offsets[:, None] + cols
    if HEAD_DIM < BLOCK_D:
        if there is None:
            return tl.load(at, mask=cols < HEAD_DIM, other=0.0)
        else:
            return tl.load(at, mask=there[:, None] & (cols < HEAD_DIM), other=0.0)
    else:
        if there is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=there[:, None], other=0.0)


@triton.jit
def store_rows(x, offsets, rows, there, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = there[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (cols < HEAD_DIM)
    tl.store(x + offsets[:, None] + cols, rows.to(x.dtype.element_ty), mask=mask)


@triton.jit
def real_keys(first, end, key_mask, m1, BLOCK_N: tl.constexpr):
    """Which keys from `first` on lie before `end` and are no padding: what the others hold may be
    anything, and is never read."""
    n = first + tl.arange(0, BLOCK_N)
    there = n < end
    if key_mask is not None:
        there = there & (tl.load(key_mask + n * m1, mask=there, other=0) != 0)
    return there


@triton.jit
def indices(first, there, key_mask, BLOCK_N: tl.constexpr):
    """The keys' indices, but of padding one that no query sees: one comparison then says all."""
    n = first + tl.arange(0, BLOCK_N)
    if key_mask is not None:
        n = tl.where(there, n, 2**31 - 1)
    return n


def sight_of(
    key_mask: Tensor | None, offsets: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple, tuple[int, int, int], int | None]:
    """key_mask, offsets and cu_seqlens as kernels take them, their strides (m0, m1, o0), and how
    many documents there are."""
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    strides = (*((0, 0) if mask is None else mask.stride()),
               0 if offsets is None else offsets.stride(0))  # fmt: skip
    if cu_seqlens is None:
        return (mask, offsets, None), strides, None
    return (mask, offsets, cu_seqlens.contiguous()), strides, cu_seqlens.shape[0] - 1
