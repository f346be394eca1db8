"""bfloat16 without loss in 12 bits a weight: what a model's weights are, in three quarters.

The exponents of a trained (or a random) matrix crowd into a few values: 15 of them, the commonest,
are coded in 4 bits each, and sign and mantissa keep their byte. The weights with another exponent
are escapes: a list of their columns and values for each row. Every bit comes back, of inf and nan
too. `formats.Packed12` is the layout, `reference.dense` the way back.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import check_stored
from .chunks import each_chunk
from .formats import ESCAPE, SEGMENT_BYTES, SEGMENT_COLUMNS, Packed12


class Table(NamedTuple):
    """The exponents that have a code, uint8 [16] of ascending values then zeros; how many there
    are, and how many weights of the matrix have none of them.
    """

    exponents: np.ndarray
    size: int
    escapes: int


def count_exponents(w: Tensor) -> Table:
    """The 15 commonest exponents of a bfloat16 matrix [n, k]; of equally common ones the larger."""
    histograms = each_chunk(lambda rows: _histogram(_exponents(_bits(w[rows]))), *w.shape)
    counts = np.sum(histograms, axis=0)
    common = sorted(np.flatnonzero(counts), key=lambda e: (-counts[e], -e))[:ESCAPE]
    table = np.zeros(ESCAPE + 1, np.uint8)
    table[: len(common)] = sorted(common)
    return Table(table, len(common), int(counts.sum() - counts[common].sum()))


@torch.inference_mode(False)  # what it makes outlives the mode
def pack_weight(w: Tensor, table: Table | None = None) -> Packed12:
    """w bfloat16 [n, k] -> its packed form, on the same device; `reference.dense` gives back every
    bit. table: what `count_exponents` found, if that is known. Raises ValueError for another w.
    """
    if w.dim() != 2 or w.dtype != torch.bfloat16:
        raise ValueError(f"w must be [n, k] of bfloat16, got {list(w.shape)} {w.dtype}")
    n, k = w.shape
    if n * k == 0:
        raise ValueError(f"w must hold weights, got {list(w.shape)}")
    table = count_exponents(w) if table is None else table
    segments = -(-k // SEGMENT_COLUMNS)
    data = np.empty((n, segments, SEGMENT_BYTES), np.uint8)

    def encode(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Write the segments of some rows; the escapes' count by row, columns and bits."""
        bits = _bits(w[rows])
        codes = _codes(_exponents(bits), table)
        _write_segments(bits, codes, data[rows])
        found = np.flatnonzero(codes == ESCAPE)
        counts = np.bincount(found // k, minlength=len(bits))
        return counts, (found % k).astype(np.int32), bits.ravel()[found]

    counts, columns, values = (
        np.concatenate(t) for t in zip(*each_chunk(encode, n, k), strict=True)
    )
    starts = np.concatenate(([0], counts.cumsum())).astype(np.int32)
    tensors = [torch.from_numpy(t) for t in (data, table.exponents, starts, columns, values)]
    tensors[-1] = tensors[-1].view(torch.bfloat16)
    packed, exponents, starts, columns, values = (t.to(w.device) for t in tensors)
    return Packed12(packed, exponents, starts, columns, values, k)


def _bits(w: Tensor) -> np.ndarray:
    """The bit patterns of bfloat16 weights, int16."""
    return np.ascontiguousarray(w.detach().to("cpu").view(torch.int16).numpy())


def _exponents(bits: np.ndarray) -> np.ndarray:
    """uint8: the cast keeps the low 8 bits of sign and exponent."""
    return (bits >> 7).astype(np.uint8)


def _histogram(exponents: np.ndarray) -> np.ndarray:
    """How often each of 256 values occurs; two at a time, since a bin costs more than its byte."""
    flat = exponents.ravel()
    pairs = np.bincount(flat[: flat.size & ~1].view(np.uint16), minlength=1 << 16)
    pairs = pairs.reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(flat[flat.size & ~1 :], minlength=256)


def _codes(exponents: np.ndarray, table: Table) -> np.ndarray:
    """The index of every exponent in the table, ESCAPE where it isn't there.

    A look-up in a table would need an int64 index a weight; the exponents of a matrix are mostly
    one run of adjacent values, and a run takes a few operations on bytes, which are vectorized.
    """
    codes: Any = np.uint8(ESCAPE)
    values = table.exponents[: table.size]
    breaks = np.flatnonzero(np.diff(values.astype(int)) != 1) + 1
    for run in np.split(np.arange(table.size, dtype=np.uint8), breaks):
        offset = exponents - values[run[0]]  # wraps: what is below the run comes out above it
        codes = np.where(offset < len(run), offset + run[0], codes)
    return codes


def _write_segments(bits: np.ndarray, codes: np.ndarray, data: np.ndarray) -> None:
    kept = ((bits >> 8) & 0x80 | bits & 0x7F).astype(np.uint8)
    n, segments, _ = data.shape
    data[..., :SEGMENT_COLUMNS] = _interleaved(kept, segments).view(np.uint8)
    halves = _interleaved(codes, segments).reshape(n, segments, 2, -1)
    data[..., SEGMENT_COLUMNS:] = (halves[:, :, 0] | halves[:, :, 1] << 4).view(np.uint8)


def _interleaved(columns: np.ndarray, segments: int) -> np.ndarray:
    """uint8 [n, k] -> uint64 [n, segments, 16]: eight columns a word, each word in its place."""
    n, k = columns.shape
    if padding := segments * SEGMENT_COLUMNS - k:
        columns = np.pad(columns, ((0, 0), (0, padding)))
    words = columns.view(np.uint64).reshape(n, segments, 2, 2, 4)
    return words.swapaxes(-1, -2).reshape(n, segments, -1)


def check_packed12(weight: Packed12) -> None:
    """Raise ValueError or TypeError for the tensors of a stored weight that don't fit each other,
    and for escapes that point outside of it.
    """
    check_stored("packed12", weight)
