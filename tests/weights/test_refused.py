"""Wrong weights are refused, plain, compressed and a decoder's; as are a decoding step's inputs."""

import re
from dataclasses import replace

import pytest
import torch

from elmkernels import decode_step, linear
from elmkernels.testing.cases.decode_step import arena, decoder
from elmkernels.testing.cases.draw import Draw
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.packed12 import pack_weight

X = torch.randn(2, 3, 64)
PLAIN = torch.randn(5, 64)
AFFINE, PACKED = quantize_weight(PLAIN, 4, 32), pack_weight(PLAIN.bfloat16())
DRAW = Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
WEIGHTS = decoder(DRAW, model_dim=64, vocab_size=9)
ARENA = arena(DRAW, WEIGHTS, 2, 6)
TOKENS = torch.tensor([1, 2])
HALF_Q = AFFINE.q[:, :4].contiguous()


def affine(**parts):
    return linear(X, replace(AFFINE, **parts))


def packed(**parts):
    return linear(X.bfloat16(), replace(PACKED, **parts))


def step(weights=WEIGHTS, tokens=TOKENS, positions=TOKENS, arena=ARENA, **k):
    return decode_step(weights, tokens, positions, arena, **k)


def several(sequences, positions):
    """Tokens of two sequences: sequences and positions of each."""
    tokens, positions = torch.tensor([1, 2, 3]), torch.tensor(positions)
    return step(tokens=tokens, positions=positions, sequences=torch.tensor(sequences))


def with_layer(**parts):
    return step(replace(WEIGHTS, layers=(WEIGHTS.layers[0], WEIGHTS.layers[1]._replace(**parts))))


def with_weights(**parts):
    return step(replace(WEIGHTS, **parts))


def with_arena(**parts):
    return step(arena=ARENA._replace(**parts))


WRONG = {
    "linear: x is int": (
        lambda: linear(X.int(), PLAIN),
        TypeError, "x must be float32, bfloat16 or float16, got torch.int32"),
    "linear: x is a scalar": (
        lambda: linear(torch.tensor(1.0), PLAIN),
        ValueError, "x must be [..., 64] like weight's columns, got []"),
    "linear: x has other columns": (
        lambda: linear(X[..., :63], AFFINE),
        ValueError, "x must be [..., 64] like weight's columns, got [2, 3, 63]"),
    "linear: the weight is None": (
        lambda: linear(X, None),
        TypeError, "weight must be a tensor, got NoneType"),
    "linear: the weight is int": (
        lambda: linear(X, PLAIN.int()),
        TypeError, "weight must be float32, bfloat16 or float16, got torch.int32"),
    "linear: the weight is one-dimensional": (
        lambda: linear(X, PLAIN[0]),
        ValueError, "weight must be [n, k], got [64]"),
    "linear: the weight has another dtype": (
        lambda: linear(X, PLAIN.half()),
        TypeError, "weight must be torch.float32 like x, got torch.float16"),
    "linear: packed for float32": (
        lambda: linear(X, PACKED),
        TypeError, "weight must be torch.float32 like x, got torch.bfloat16"),
    "linear: the weight is on meta": (
        lambda: linear(X, PLAIN.to("meta")),
        ValueError, "weight must be on cpu like x, got meta"),
    "linear: all is on meta": (
        lambda: linear(X.to("meta"), PLAIN.to("meta")),
        RuntimeError, "linear runs on cpu or cuda, got a tensor on meta"),
    "affine: 3 bits": (
        lambda: affine(bits=3),
        ValueError, "weight.bits must be 8 or 4, got 3"),
    "affine: groups of 16": (
        lambda: affine(group_size=16),
        ValueError, "weight.group_size must be 32 or 64, got 16"),
    "affine: q is a list": (
        lambda: affine(q=[1]),
        TypeError, "weight.q must be a tensor, got list"),
    "affine: q is one-dimensional": (
        lambda: affine(q=AFFINE.q[0]),
        ValueError, "weight.q must be [n, k bits / 32], got [8]"),
    "affine: half a group": (
        lambda: affine(q=HALF_Q, group_size=64),
        ValueError, "weight.q must be of a multiple of 64 columns (group_size), got 32"),
    "affine: q is int32": (
        lambda: affine(q=AFFINE.q.view(torch.int32)),
        TypeError, "weight.q must be torch.uint32, got torch.int32"),
    "affine: q is strided": (
        lambda: affine(q=AFFINE.q.repeat(1, 2)[:, :8]),
        ValueError, "weight.q must be contiguous, got strides (16, 1)"),
    "affine: scales are int": (
        lambda: affine(scales=AFFINE.scales.int()),
        TypeError, "weight.scales must be float32, bfloat16 or float16, got torch.int32"),
    "affine: too few scales": (
        lambda: affine(scales=AFFINE.scales[:, :1].contiguous()),
        ValueError, "weight.scales must be [5, 2], got [5, 1]"),
    "affine: biases of another dtype": (
        lambda: affine(biases=AFFINE.biases.half()),
        TypeError, "weight.biases must be torch.float32, got torch.float16"),
    "affine: biases are on meta": (
        lambda: affine(biases=AFFINE.biases.to("meta")),
        ValueError, "weight.biases must be on cpu, got meta"),
    "packed: data is a list": (
        lambda: packed(data=[1]),
        TypeError, "weight.data must be a tensor, got list"),
    "packed: data is two-dimensional": (
        lambda: packed(data=PACKED.data[0]),
        ValueError, "weight.data must be [n, segments, 192], got [1, 192]"),
    "packed: too many columns": (
        lambda: packed(columns=129),
        ValueError, "weight.data must be [5, 2, 192], got [5, 1, 192]"),
    "packed: int8": (
        lambda: packed(data=PACKED.data.view(torch.int8)),
        TypeError, "weight.data must be torch.uint8, got torch.int8"),
    "packed: 15 exponents": (
        lambda: packed(exponents=PACKED.exponents[:15]),
        ValueError, "weight.exponents must be [16], got [15]"),
    "packed: starts of fewer rows": (
        lambda: packed(escape_starts=PACKED.escape_starts[1:]),
        ValueError, "weight.escape_starts must be [6], got [5]"),
    "packed: int64 columns": (
        lambda: packed(escape_columns=PACKED.escape_columns.long()),
        TypeError, "weight.escape_columns must be torch.int32, got torch.int64"),
    "packed: float32 values": (
        lambda: packed(escape_values=PACKED.escape_values.float()),
        TypeError, "must be torch.bfloat16"),
    "decode_step: tokens are int32": (
        lambda: step(tokens=TOKENS.int()),
        TypeError, "tokens must be torch.int64, got torch.int32"),
    "decode_step: positions are a list": (
        lambda: step(positions=[1, 2]),
        TypeError, "positions must be a tensor, got list"),
    "decode_step: tokens are two-dimensional": (
        lambda: step(tokens=TOKENS[:, None]),
        ValueError, "tokens must be [n] of at most 8, got [2, 1]"),
    "decode_step: nine sequences": (
        lambda: step(tokens=torch.arange(9)),
        ValueError, "tokens must be [n] of at most 8, got [9]"),
    "decode_step: one position": (
        lambda: step(positions=TOKENS[:1]),
        ValueError, "positions must be [2] like tokens, got [1]"),
    "decode_step: the arena is None": (
        lambda: with_arena(data=None),
        TypeError, "arena.data must be a tensor, got NoneType"),
    "decode_step: a half arena": (
        lambda: with_arena(data=ARENA.data.half()),
        TypeError, "arena must be torch.float32 like the norms, got torch.float16"),
    "decode_step: a strided arena": (
        lambda: with_arena(data=ARENA.data[::2]),
        ValueError, "arena.data must be [elements], contiguous"),
    "decode_step: an arena of three": (
        lambda: with_arena(batch=3),
        ValueError, "arena must be of 2 sequences like tokens, got 3"),
    "decode_step: offsets of one layer": (
        lambda: with_arena(offsets=ARENA.offsets[:1]),
        ValueError, "arena.offsets must be [2, 2], got [1, 2]"),
    "decode_step: int32 offsets": (
        lambda: with_arena(offsets=ARENA.offsets.int()),
        TypeError, "arena.offsets must be torch.int64, got torch.int32"),
    "decode_step: strided offsets": (
        lambda: with_arena(offsets=ARENA.offsets.T.contiguous().T),
        ValueError, "arena.offsets must be contiguous, got strides (1, 2)"),
    "decode_step: another head_dim": (
        lambda: with_arena(head_dim=32),
        ValueError, "arena.head_dim must be 64, got 32"),
    "decode_step: sequences are a list": (
        lambda: step(sequences=[0, 1]),
        TypeError, "sequences must be a tensor, got list"),
    "decode_step: sequences are int32": (
        lambda: step(sequences=TOKENS.int()),
        TypeError, "sequences must be torch.int64, got torch.int32"),
    "decode_step: one sequence": (
        lambda: step(sequences=TOKENS[:1]),
        ValueError, "sequences must be [2] like tokens, got [1]"),
    "decode_step: sequences are elsewhere": (
        lambda: step(sequences=TOKENS.to("meta")),
        ValueError, "sequences must be on cpu, got meta"),
    "decode_step: a third sequence of two": (
        lambda: step(sequences=TOKENS),
        ValueError, "sequences must be in [0, 2) (the arena's sequences), got 2"),
    "decode_step: a sequence below 0": (
        lambda: step(sequences=TOKENS - 2),
        ValueError, "sequences must be in [0, 2) (the arena's sequences), got -1"),
    "decode_step: tokens of a sequence apart": (
        lambda: several([0, 1, 0], [1, 1, 2]),
        ValueError, "sequences must be of neighbours, all tokens of one together, got [0, 1, 0]"),
    "decode_step: a position is left out": (
        lambda: several([1, 1, 1], [1, 2, 4]),
        ValueError, "positions[2] must be 3 behind 2 of sequence 1, got 4"),
    "decode_step: a position comes twice": (
        lambda: several([1, 0, 0], [1, 2, 2]),
        ValueError, "positions[2] must be 3 behind 2 of sequence 0, got 2"),
    "decode_step: positions fall": (
        lambda: several([0, 0, 1], [2, 1, 0]),
        ValueError, "positions[1] must be 3 behind 2 of sequence 0, got 1"),
    "decode_step: chosen is a list": (
        lambda: step(chosen=[1, 2]),
        TypeError, "chosen must be a tensor, got list"),
    "decode_step: chosen is int32": (
        lambda: step(chosen=TOKENS.int()),
        TypeError, "chosen must be torch.int64, got torch.int32"),
    "decode_step: one is chosen": (
        lambda: step(chosen=TOKENS[:1]),
        ValueError, "chosen must be [2] like tokens, got [1]"),
    "decode_step: chosen is strided": (
        lambda: step(chosen=TOKENS.repeat(2)[::2]),
        ValueError, "chosen must be contiguous, got strides (2,)"),
    "decode_step: chosen is elsewhere": (
        lambda: step(chosen=TOKENS.to("meta")),
        ValueError, "chosen must be on cpu, got meta"),
    "weights: the norm is int": (
        lambda: with_weights(norm=WEIGHTS.norm.int()),
        TypeError, "arena must be torch.int32 like the norms, got torch.float32"),
    "weights: the norm is on meta": (
        lambda: with_weights(norm=WEIGHTS.norm.to("meta")),
        ValueError, "arena must be on meta like the norms, got cpu"),
    "weights: the norm is two-dimensional": (
        lambda: with_weights(norm=WEIGHTS.norm[None]),
        ValueError, "weights.norm must be [model_dim], contiguous, got [1, 64]"),
    "weights: an odd head_dim": (
        lambda: with_weights(head_dim=63),
        ValueError, "arena.head_dim must be 63, got 64"),
    "weights: a half table": (
        lambda: with_weights(rope_table=WEIGHTS.rope_table.half()),
        TypeError, "weights.rope_table must be torch.float32, got torch.float16"),
    "weights: a narrow table": (
        lambda: with_weights(rope_table=WEIGHTS.rope_table[:, :32]),
        ValueError, "weights.rope_table must be [256, 64], got [256, 32]"),
    "weights: a narrow embedding": (
        lambda: with_weights(embedding=WEIGHTS.embedding[:, :32]),
        ValueError, "weights.embedding must be [9, 64], got [9, 32]"),
    "weights: a half head": (
        lambda: with_weights(head=WEIGHTS.head.half()),
        TypeError, "weights.head must be torch.float32 like norm, got torch.float16"),
    "weights: a head on meta": (
        lambda: with_weights(head=WEIGHTS.head.to("meta")),
        ValueError, "weights.head must be on cpu like norm, got meta"),
    "weights: a transposed head": (
        lambda: with_weights(head=WEIGHTS.head.T.contiguous().T),
        ValueError, "weights.head must be of contiguous rows, got strides (1, 9)"),
    "weights: without its gate": (
        lambda: with_weights(gated=False),
        ValueError, "weights.layers[0].proj_1 must be [256, 64], got [512, 64]"),
    "layer: no heads": (
        lambda: with_layer(q_heads=0),
        ValueError, "weights.layers[1].q_heads must be a positive integer, got 0"),
    "layer: no key heads": (
        lambda: with_layer(kv_heads=0),
        ValueError, "weights.layers[1].kv_heads must be a positive integer, got 0"),
    "layer: heads don't divide": (
        lambda: with_layer(q_heads=11),
        ValueError, "weights.layers[1].q_heads must be a multiple of kv_heads 3, got 11"),
    "layer: other heads than its weights": (
        lambda: with_layer(q_heads=9),
        ValueError, "weights.layers[1].qkv_proj must be [960, 64], got [1152, 64]"),
    "layer: a short norm": (
        lambda: with_layer(attn_norm=WEIGHTS.norm[:9]),
        ValueError, "weights.layers[1].attn_norm must be [64], got [9]"),
    "layer: a strided norm": (
        lambda: with_layer(ffn_norm=torch.rand(128)[::2]),
        ValueError, "weights.layers[1].ffn_norm must be contiguous, got strides (2,)"),
    "layer: a half norm": (
        lambda: with_layer(q_norm=torch.rand(64).half()),
        TypeError, "weights.layers[1].q_norm must be torch.float32 like norm, or torch.float32"
        ", got torch.float16"),
    "layer: a packed weight among float32": (
        lambda: with_layer(out_proj=pack_weight(WEIGHTS.layers[1].out_proj.bfloat16())),
        TypeError,
        "weights.layers[1].out_proj must be torch.float32 like norm, got torch.bfloat16"),
    "layer: a weight is None": (
        lambda: with_layer(proj_2=None),
        TypeError, "weights.layers[1].proj_2 must be a tensor, got NoneType"),
    "layer: a short proj_2": (
        lambda: with_layer(proj_2=WEIGHTS.layers[1].proj_2[:9]),
        ValueError, "weights.layers[1].proj_2 must be [64, 384], got [9, 384]"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_message(what):
    call, kind, message = WRONG[what]
    with pytest.raises(kind, match=re.escape(message)) as raised:
        call()
    assert type(raised.value) is kind
