"""bfloat16 without loss in 12 bits a weight: what a model's weights are, in three quarters.

The exponents of a trained (or a random) matrix crowd into a few values: 15 of them, the commonest,
are coded in 4 bits each, and sign and mantissa keep their byte. The weights with another exponent
are escapes: a list of their columns and values for each row. Every bit comes back, of inf and nan
too. `formats.Packed` is the layout, `reference.dense` the way back.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..formats import ESCAPE, SEGMENT_BYTES, SEGMENT_COLUMNS, Packed
from .compressed import Compressed, CompressedEmbedding, CompressedLinear
from .convert import Conversion, convert, dense_weight, each_chunk, plain
from .model import OpenELM

# An escape takes 6 bytes and, in a product, a step of its own where the others go 32 or more at a
# time: from 1 in 64 on, those steps would be as long as all the rest.
MAX_ESCAPES = 1 / 64


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


def pack_weight(w: Tensor, table: Table | None = None) -> Packed:
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
    return Packed(*(t.to(w.device) for t in tensors), k)


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
    one run of adjacent values, and a run takes a few operations on bytes, which are vectorised.
    """
    codes = np.uint8(ESCAPE)
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


def pack(model: OpenELM, embeddings: bool = True, *, progress: bool = True) -> Conversion:
    """Pack every bfloat16 projection of an OpenELM model in place, without loss; with embeddings,
    those of tokens and the output as well. A matrix with more than 1 escape in 64 weights stays
    as it is and is reported. An accelerated model stays accelerated. progress: show it on a
    terminal.

    Raises TypeError for another model, ValueError for weights of another dtype and for quantised
    ones; nothing is changed then. Stopped half way, it can be called again.
    """

    def check(name: str, module: nn.Module) -> None:
        if isinstance(module, Compressed):
            if not isinstance(module, _Packed):
                raise ValueError(f"{name} must be plain bfloat16, got {type(module).__name__}")
        elif module.weight.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bfloat16 to be packed, got {module.weight.dtype}")

    def make(name: str, module: nn.Module) -> nn.Module | str | None:
        if isinstance(module, _Packed):
            return None
        w = dense_weight(module)
        table = count_exponents(w)
        if table.escapes > MAX_ESCAPES * w.numel():
            return (
                f"{table.escapes / w.numel():.1%} of its weights have an exponent beside the "
                f"{ESCAPE} commonest (at most {MAX_ESCAPES:.1%} pay)"
            )
        return packed_module(name, pack_weight(w, table))

    return convert(model, embeddings, "packed", check, make, progress)


def unpack(model: OpenELM, *, progress: bool = True) -> Conversion:
    """Give a packed model its plain bfloat16 modules back (for training, or to be cast), in place.

    Raises TypeError for another model, ValueError for one that holds no packed weights.
    """
    if isinstance(model, OpenELM) and not any(isinstance(m, _Packed) for m in model.modules()):
        raise ValueError("model must hold packed weights to be unpacked, it has none")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, _Packed):
            return None
        return plain(module, dense_weight(module), model.config.padding_index)

    return convert(model, True, "unpacked", lambda name, module: None, make, progress)


class _Packed(Compressed):
    """Buffers named as in a checkpoint. They stay what they are when the model is cast."""

    names = ("packed", "exponents", "escape_starts", "escape_columns", "escape_values")

    def __init__(self, weight: Packed) -> None:
        super().__init__(weight)
        tensors = (
            weight.data,
            weight.exponents,
            weight.escape_starts,
            weight.escape_columns,
            weight.escape_values,
        )
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def compressed(self) -> Packed:
        return Packed(*(getattr(self, name) for name in self.names), self.in_features)

    def _apply(self, fn, recurse=True):
        before = self.escape_values
        super()._apply(fn, recurse)
        if self.escape_values.dtype != torch.bfloat16:
            self.escape_values = before.to(self.escape_values.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # How many escapes there are is the weight's own: make room for those that come.
        for name in ("escape_columns", "escape_values"):
            incoming, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(incoming, Tensor) and incoming.dim() == 1:
                setattr(self, name, own.new_empty(incoming.shape[0]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PackedLinear(_Packed, CompressedLinear):
    """A projection by a packed weight."""


class PackedEmbedding(_Packed, CompressedEmbedding):
    """Token embeddings by a packed weight, and the tied head's weight."""


def packed_module(name: str, weight: Packed) -> PackedLinear | PackedEmbedding:
    """The module of a model's matrix, by its name in the model."""
    return (PackedEmbedding if name == "token_embeddings" else PackedLinear)(weight)


def check_packed(weight: Packed) -> None:
    """Raise ValueError where the escapes of a stored weight point outside of it."""
    starts, columns = weight.escape_starts, weight.escape_columns
    if starts.device.type == "meta":
        return
    count = columns.numel()
    if weight.escape_values.numel() != count:
        raise ValueError(f"{count} escape_columns, {weight.escape_values.numel()} escape_values")
    if int(starts[0]) or int(starts[-1]) != count or bool((starts.diff() < 0).any()):
        raise ValueError(f"escape_starts must ascend from 0 to {count}")
    if count and not 0 <= int(columns.min()) <= int(columns.max()) < weight.columns:
        raise ValueError(f"escape_columns must lie in [0, {weight.columns})")
