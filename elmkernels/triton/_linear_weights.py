"""What linear's kernels share: a weight [n, k] in any of its forms as tiles, and their float32.

A tile is BLOCK_N rows of UNITS units, a unit being COLS neighbouring columns of one row. A thread
loads whole units and so adds up a unit's products without asking another thread:

- plain: 16 bytes, 8 columns of a half type or 4 of float32;
- `Affine` of 8 bits: 8 columns in a word of 64 bits, of 4 bits: 8 columns in a word of 32 bits.
  Wider loads would give a thread columns whose activations lie apart, and cost more in those than
  they save: lanes side by side fill whole cache lines all the same;
- `Packed12`: 8 columns in 8 bytes of sign and mantissa and the 8 bytes that hold their codes, which
  are the codes of the 8 columns 64 further too: another lane of the same load reads them there. The
  exponent of a code is looked up in memory, where its 16 bytes stay in the first cache: selecting
  it from registers would take about seven integer operations a weight.

All offsets of rows are int64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile

FLOAT, PACKED = tl.constexpr(0), tl.constexpr(12)
SEGMENT_WORDS = tl.constexpr(24)  # 64 bits each: 16 of sign and mantissa, 8 of codes
ESCAPE = tl.constexpr(15)


@dataclass(frozen=True, eq=False)
class Block(Tile):
    """A row of a table of linear. `width` is the largest n and `rows` the most rows of x that it
    is for; a program takes `tile` rows of the weight, with one unit of each a thread at a time."""


class Stored(NamedTuple):
    """The tensors of a weight as a kernel takes them, and what is compiled for their form."""

    tensors: tuple[Tensor | None, ...]
    stride: int  # of data, in elements of what the kernel reads; of a plain weight in units of vec
    form: int
    group: int


def _words(t: Tensor, size: torch.dtype) -> Tensor:
    """t in words of another size: where those would not be aligned, a copy that is."""
    t = t if t.data_ptr() % 8 == 0 else t.clone()
    return t.view(torch.uint8).view(size)


def stored(parts: tuple, k: int, vec: int) -> Stored:
    """parts: of a weight, as `ops.linear` hands them over."""
    data, scales, biases, *escapes, bits = parts
    if bits == 0:
        return Stored((data, None, None, *escapes), data.stride(0) // vec, 0, 0)
    if bits == PACKED.value:
        data = _words(data.flatten(1), torch.int64)
        return Stored((data, None, None, *escapes), data.shape[1], bits, 0)
    data = _words(data, torch.int64 if bits == 8 else torch.int32)
    group = k // scales.shape[1] if scales.shape[1] else 1
    return Stored((data, scales, biases, *escapes), data.shape[1], bits, group)


@triton.jit
def load_tile(
    data, scales, biases, row, live, stride, first, k,
    FORM: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The units from `first` on of rows `row` (int64 [BLOCK_N]), as they are stored: three values,
    some of them 0 for want of more. Weights are read once: they shall not push out what is read
    by every program.
    """
    live = live[:, None]
    if FORM == FLOAT:
        cols = (first * COLS + tl.arange(0, UNITS * COLS))[None, :]
        at = data + (row * stride)[:, None] + cols
        w = tl.load(at, mask=live & (cols < k), other=0.0, eviction_policy="evict_first")
        return w, 0, 0
    elif FORM == PACKED:
        unit = (first + tl.arange(0, UNITS))[None, :]
        there = live & (unit * COLS < k)
        pair = unit % 4 * 2 + unit // 4 % 2
        at = data + (row * stride)[:, None] + unit // 16 * SEGMENT_WORDS
        kept = tl.load(
            at + unit // 8 % 2 * 8 + pair, mask=there, other=0, eviction_policy="evict_first"
        )
        codes = tl.load(at + 16 + pair, mask=there, other=0, eviction_policy="evict_first")
        return kept, codes >> (unit // 8 % 2 * 4).to(tl.int64), 0
    else:
        unit = (first + tl.arange(0, UNITS))[None, :]
        there = live & (unit * COLS < k)
        at = data + (row * stride)[:, None] + unit
        q = tl.load(at, mask=there, other=0, eviction_policy="evict_first")
        group = (row * (k // GROUP))[:, None] + unit * COLS // GROUP
        scale = tl.load(scales + group, mask=there, other=0.0).to(tl.float32)
        bias = tl.load(biases + group, mask=there, other=0.0).to(tl.float32)
        return q, scale, bias


@triton.jit
def _codes(words, BITS: tl.constexpr, COLS: tl.constexpr):
    """The COLS numbers of BITS bits, 8 apart or side by side, in each word: int32 [..., COLS]."""
    shifts = (tl.arange(0, COLS) * BITS)[None, None, :].to(words.dtype)
    return (words[:, :, None] >> shifts).to(tl.int32)


@triton.jit
def _exponent(words, exponents, COLUMN: tl.constexpr):
    return tl.load(exponents + (words >> (8 * COLUMN) & 15).to(tl.int32)).to(tl.int32)


@triton.jit
def _exponents(words, table, BLOCK_N: tl.constexpr, UNITS: tl.constexpr):
    """int32 [BLOCK_N, UNITS, 8]. Column by column, so that the lanes stay where the words are."""
    left = tl.join(
        tl.join(_exponent(words, table, 0), _exponent(words, table, 4)),
        tl.join(_exponent(words, table, 2), _exponent(words, table, 6)),
    )
    right = tl.join(
        tl.join(_exponent(words, table, 1), _exponent(words, table, 5)),
        tl.join(_exponent(words, table, 3), _exponent(words, table, 7)),
    )
    return tl.reshape(tl.join(left, right), [BLOCK_N, UNITS, 8])


@triton.jit
def unpack(
    tile, exponents, first, k, FORM: tl.constexpr, ROUNDED: tl.constexpr, BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, UNITS, COLS]; escapes and what lies beyond k are zeros. ROUNDED: scale q
    is rounded before bias is added, as the reference does. Else q of 8 bits is taken as 256 + q, of
    4 bits as 16 + q, which they are as bits below the leading one of a float: a conversion from an
    integer takes eight times as long as a product. 256 is taken away again; bias makes up for 16,
    which costs no more than a rounding of its own, and an addition for each of twice as many
    weights would be in the memory's way.
    """
    if FORM == FLOAT:
        return tl.reshape(tile[0], [BLOCK_N, UNITS, COLS]).to(tl.float32)
    elif FORM == PACKED:
        kept = _codes(tile[0], 8, COLS)
        code = _codes(tile[1], 8, COLS) & 15
        exponent = _exponents(tile[1], exponents, BLOCK_N, UNITS)
        bits = ((kept & 0x80) << 24) | (exponent << 23) | ((kept & 0x7F) << 16)
        col = ((first + tl.arange(0, UNITS)) * COLS)[None, :, None]
        col += tl.arange(0, COLS)[None, None, :]
        return tl.where((code == ESCAPE) | (col >= k), 0.0, bits.to(tl.float32, bitcast=True))
    else:
        scale, bias = tile[1][:, :, None], tile[2][:, :, None]
        q = _codes(tile[0], FORM, COLS) & (2**FORM - 1)
        if ROUNDED:
            return scale * q.to(tl.float32) + bias
        else:
            one: tl.constexpr = 0x43800000 if FORM == 8 else 0x41800000
            high = ((q << (23 - FORM)) | one).to(tl.float32, bitcast=True)
            if FORM == 8:
                return scale * (high - 256.0) + bias
            else:
                return scale * high + (bias - scale * 16.0)


@triton.jit
def escapes_of(begin, end, columns, values, AT_ONCE: tl.constexpr):
    """Columns and values of the next escapes of some rows, [rows, AT_ONCE], and which are any."""
    at = begin[:, None] + tl.arange(0, AT_ONCE)[None, :]
    there = at < end[:, None]
    cols = tl.load(columns + at, mask=there, other=0)
    return cols, tl.load(values + at, mask=there, other=0.0), there
