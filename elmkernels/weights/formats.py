"""How weights lie in memory, and the table of a decoder's layers: data that ops and models share.

A weight [n, k] is a plain Tensor or one of two compressed forms of it:

- `Affine`: w = scales q + biases per group of columns, q of 8 or 4 bits, in MLX's layout.
- `Packed12`: bfloat16 without loss in 12 bits: sign and mantissa in a byte, the exponent as a 4-bit
  index into the matrix's 15 commonest, and a list of the few weights whose exponent is another.

What a form is, its class knows: the tensors that kernels take, its rows, its checks, and the dense
matrix that it stands for. `form_of` gives a plain Tensor the same methods. Nothing outside of this
room asks which form a weight has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import fail, floating, positive, tensor
from .base import Dense, Form, Parts, check_part
from .indices import check_escapes

__all__ = [
    "BITS",
    "ESCAPE",
    "GROUP_SIZES",
    "SEGMENT_BYTES",
    "SEGMENT_COLUMNS",
    "Affine",
    "Arena",
    "DecoderWeights",
    "Dense",
    "Form",
    "Layer",
    "Packed12",
    "Parts",
    "Weight",
    "check_part",
    "form_of",
    "is_compressed",
]

BITS = (8, 4)
GROUP_SIZES = (32, 64)
# A row of `Packed12` is a sequence of segments: 128 sign-and-mantissa bytes, 64 bytes of codes.
SEGMENT_COLUMNS, SEGMENT_BYTES = 128, 192
ESCAPE = 15  # the code of a weight whose exponent is not in the table


@dataclass(frozen=True, eq=False)
class Affine(Form):
    """w[n, c] = scales[n, g] q[n, c] + biases[n, g] with g = c // group_size.

    q: uint32 [n, k bits / 32], column c in bits (c bits) mod 32 and up of word c bits / 32.
    scales, biases: [n, k / group_size] in the weights' floating dtype.
    """

    q: Tensor
    scales: Tensor
    biases: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1] * 32 // self.bits

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes + self.biases.nbytes

    def parts(self) -> Parts:
        return Parts(self.q, self.scales, self.biases, None, None, None, None, self.bits)

    def rows(self, begin: int, end: int) -> "Affine":
        q, scales, biases = (t[begin:end] for t in (self.q, self.scales, self.biases))
        return Affine(q, scales, biases, self.bits, self.group_size)

    def gather(self, ids: Tensor) -> "Affine":
        q = self.q.view(torch.int32)[ids].view(torch.uint32)  # torch can't index uint32
        return Affine(q, self.scales[ids], self.biases[ids], self.bits, self.group_size)

    def check(self, name: str) -> None:
        positive(f"{name}.bits", self.bits)
        positive(f"{name}.group_size", self.group_size)
        if self.bits not in BITS:
            fail(f"{name}.bits", " or ".join(map(str, BITS)), self.bits)
        if self.group_size not in GROUP_SIZES:
            fail(f"{name}.group_size", " or ".join(map(str, GROUP_SIZES)), self.group_size)
        tensor(f"{name}.q", self.q)
        if self.q.dim() != 2:
            fail(f"{name}.q", "[n, k bits / 32]", list(self.q.shape))
        n, k = self.shape
        if k % self.group_size:
            fail(f"{name}.q", f"of a multiple of {self.group_size} columns (group_size)", k)
        floating(f"{name}.scales", self.scales)
        check_part(f"{name}.q", self.q, torch.uint32, self.q.shape, self.q.device)
        shape, dtype = (n, k // self.group_size), self.scales.dtype
        for part, x in (("scales", self.scales), ("biases", self.biases)):
            check_part(f"{name}.{part}", x, dtype, shape, self.q.device)

    def check_numbers(self, name: str) -> None:
        for part, x in (("scales", self.scales), ("biases", self.biases)):
            if x.numel() and not x.is_meta and not all(bool(v.isfinite()) for v in x.aminmax()):
                fail(f"{name}.{part}", "finite", "inf or nan")

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """scales q + biases in float32 (float64 if asked for), rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        words = self.q.view(torch.int32)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=words.device)
        q = (words[..., None] >> shifts) & (2**self.bits - 1)
        groups = q.flatten(1).unflatten(1, (-1, self.group_size)).to(wide)
        exact = self.scales.to(wide)[..., None] * groups + self.biases.to(wide)[..., None]
        return exact.flatten(1).to(dtype or self.dtype)

    def takes(self, dtype: torch.dtype) -> bool:
        return True

    takes_int8 = True  # no field: any of them


@dataclass(frozen=True, eq=False)
class Packed12(Form):
    """A bfloat16 matrix [n, columns] in 12 bits a weight.

    data: uint8 [n, segments, 192], a segment for every 128 columns (the last one padded with
    zeros). Its first 128 bytes are sign (bit 7) and mantissa of each weight, its last 64 the codes:
    byte p holds the code of byte p in its low nibble and of byte 64 + p in its high one. Byte
    16 j + i of each 64 belongs to column 8 j + i for i < 8, and to column 32 + 8 j + i - 8 for the
    rest, so that interleaving bytes within 16 rebuilds bfloat16 lanes in order.
    exponents: uint8 [16], the exponent of each code; that of ESCAPE is 0.
    escape_starts: int32 [n + 1], where each row's escapes begin; escape_columns: int32, ascending
    in a row; escape_values: bfloat16, the weights themselves.
    """

    data: Tensor
    exponents: Tensor
    escape_starts: Tensor
    escape_columns: Tensor
    escape_values: Tensor
    columns: int

    group_size = 0  # no field: there are no groups

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.columns

    @property
    def dtype(self) -> torch.dtype:
        return self.escape_values.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        tensors = (self.data, self.exponents, self.escape_starts, self.escape_columns)
        return sum(t.nbytes for t in tensors) + self.escape_values.nbytes

    @property
    def native_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def parts(self) -> Parts:
        escapes = (self.escape_starts, self.escape_columns, self.escape_values)
        return Parts(self.data, None, None, self.exponents, *escapes, 12)

    def rows(self, begin: int, end: int) -> "Packed12":
        starts = self.escape_starts[begin : end + 1]
        first, last = int(starts[0]), int(starts[-1])
        escapes = self.escape_columns[first:last], self.escape_values[first:last]
        data = self.data[begin:end]
        return Packed12(data, self.exponents, starts - first, *escapes, self.columns)

    def gather(self, ids: Tensor) -> "Packed12":
        begin = self.escape_starts[ids]
        counts = self.escape_starts[ids + 1] - begin
        starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        found = torch.repeat_interleave(begin - starts[:-1], counts)
        found += torch.arange(found.shape[0], dtype=found.dtype, device=found.device)
        escapes = self.escape_columns[found], self.escape_values[found]
        return Packed12(self.data[ids], self.exponents, starts, *escapes, self.columns)

    def check(self, name: str) -> None:
        tensor(f"{name}.data", self.data)
        if self.data.dim() != 3:
            fail(f"{name}.data", f"[n, segments, {SEGMENT_BYTES}]", list(self.data.shape))
        positive(f"{name}.columns", self.columns)
        n, segments = self.data.shape[0], -(-self.columns // SEGMENT_COLUMNS)
        device = self.data.device
        shape = (n, segments, SEGMENT_BYTES)
        check_part(f"{name}.data", self.data, torch.uint8, shape, device)
        check_part(f"{name}.exponents", self.exponents, torch.uint8, (16,), device)
        check_part(f"{name}.escape_starts", self.escape_starts, torch.int32, (n + 1,), device)
        columns, values = self.escape_columns, self.escape_values
        tensor(f"{name}.escape_columns", columns)
        shape = (columns.numel(),)
        check_part(f"{name}.escape_columns", columns, torch.int32, shape, device)
        check_part(f"{name}.escape_values", values, torch.bfloat16, shape, device)

    @property
    def indices(self) -> tuple[Tensor, ...]:
        return self.escape_columns, self.escape_starts

    def check_numbers(self, name: str) -> None:
        check_escapes(name, self.escape_starts, self.escape_columns, self.columns)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The bfloat16 weights, bit for bit."""
        n, segments, _ = self.data.shape
        bytes_, codes = self.data.int().split((SEGMENT_COLUMNS, SEGMENT_COLUMNS // 2), dim=-1)
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        exponent = self.exponents.int()[codes.long()]
        bits = (bytes_ & 0x80) << 8 | exponent << 7 | bytes_ & 0x7F
        # Of each 64 bytes, those of the even groups of 8 are columns 0..31, the others 32..63.
        bits = bits.view(n, 2 * segments, 4, 2, 8).transpose(2, 3).flatten(1)
        found = bits.to(torch.uint16).view(torch.bfloat16)[:, : self.columns].clone()
        rows = torch.arange(n, device=bits.device).repeat_interleave(
            self.escape_starts.diff().long()
        )
        found[rows, self.escape_columns.long()] = self.escape_values
        return found if dtype is None else found.to(dtype)

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype


Weight = Tensor | Affine | Packed12


def form_of(weight: Weight) -> Form:
    """The weight with the methods of its form."""
    return weight if isinstance(weight, Form) else Dense(weight)


def is_compressed(weight: object) -> bool:
    """Whether a weight is in another form than a plain Tensor."""
    return isinstance(weight, Form)


class Layer(NamedTuple):
    """The weights and head counts of one decoder layer."""

    attn_norm: Tensor  # [model_dim]
    qkv_proj: Weight  # [(q_heads + 2 kv_heads) head_dim, model_dim]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    out_proj: Weight  # [model_dim, q_heads head_dim]
    ffn_norm: Tensor  # [model_dim]
    proj_1: Weight  # [2 ffn_dim, model_dim], or [ffn_dim, model_dim] without a gate
    proj_2: Weight  # [model_dim, ffn_dim]
    q_heads: int
    kv_heads: int


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A whole decoder as data: layer-wise scaling is in the rows of `layers`, not in code.

    Its identity is what kernels remember it by: another model's weights are another object. It is
    checked at its first step, and again if the memory of a weight is replaced.
    """

    embedding: Weight  # [vocab_size, model_dim]
    layers: tuple[Layer, ...]
    norm: Tensor  # [model_dim]
    head: Weight  # [vocab_size, model_dim]; the embedding itself where they are tied
    rope_table: Tensor  # float32 [table_length, head_dim]
    head_dim: int
    gated: bool
    eps: float
    # "int8": what meets an `Affine` matrix is rounded to 8 bits, as `ops.linear` does it.
    activations: str | None = None

    @property
    def model_dim(self) -> int:
        return self.norm.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    def weights(self) -> Iterator[Weight]:
        """Every matrix and every norm's weight."""
        yield from (self.embedding, self.norm, self.head)
        for layer in self.layers:
            yield from (w for w in layer if isinstance(w, Tensor | Form))


class Arena(NamedTuple):
    """Keys and values of all layers in one buffer, as `openelm.KVCache` lays it out.

    Layer i's keys are [batch, kv_heads_i, max_length, head_dim] from element offsets[i, 0] of
    `data` on, its values likewise from offsets[i, 1]: the tokens of a head are contiguous.
    """

    data: Tensor  # [elements], in the dtype of the activations
    offsets: Tensor  # int64 [layers, 2], on the CPU
    batch: int
    max_length: int
    head_dim: int

    def views(self, layer: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values as [batch, max_length, kv_heads, head_dim]."""
        shape = (self.batch, kv_heads, self.max_length, self.head_dim)
        count = self.batch * kv_heads * self.max_length * self.head_dim
        starts = self.offsets[layer].tolist()
        k, v = (self.data[s : s + count].view(shape).transpose(1, 2) for s in starts)
        return k, v
