"""How weights lie in memory, and the table of a decoder's layers: data that ops and models share.

A weight [n, k] is a plain Tensor or one of two compressed forms of it:

- `Affine`: w = scales q + biases per group of columns, q of 8 or 4 bits, in MLX's layout.
- `Packed12`: bfloat16 without loss in 12 bits: sign and mantissa in a byte, the exponent as a 4-bit
  index into the matrix's 15 commonest, and a list of the few weights whose exponent is another.

`reference.dense` is the specification of both.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

BITS = (8, 4)
GROUP_SIZES = (32, 64)
# A row of `Packed12` is a sequence of segments: 128 sign-and-mantissa bytes, 64 bytes of codes.
SEGMENT_COLUMNS, SEGMENT_BYTES = 128, 192
ESCAPE = 15  # the code of a weight whose exponent is not in the table


@dataclass(frozen=True, eq=False)
class Affine:
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
    def dtype(self):
        return self.scales.dtype

    @property
    def device(self):
        return self.q.device

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes + self.biases.nbytes


@dataclass(frozen=True, eq=False)
class Packed12:
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

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.columns

    @property
    def dtype(self):
        return self.escape_values.dtype

    @property
    def device(self):
        return self.data.device

    @property
    def nbytes(self) -> int:
        tensors = (self.data, self.exponents, self.escape_starts, self.escape_columns)
        return sum(t.nbytes for t in tensors) + self.escape_values.nbytes


Weight = Tensor | Affine | Packed12


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

    Its identity is what kernels remember it by: another model's weights are another object.
    """

    embedding: Weight  # [vocab_size, model_dim]
    layers: tuple[Layer, ...]
    norm: Tensor  # [model_dim]
    head: Weight  # [vocab_size, model_dim]; the embedding itself where they are tied
    rope_table: Tensor  # float32 [table_length, head_dim]
    head_dim: int
    gated: bool
    eps: float

    @property
    def model_dim(self) -> int:
        return self.norm.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]


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
