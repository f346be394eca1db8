"""Weights in any form, and a decoder's: checks, rows, and their tensors as kernels take them."""

import torch
from torch import Tensor

from ..checks import fail, floating, positive, tensor
from ..checks import weight as check_norm
from .formats import (
    BITS,
    GROUP_SIZES,
    SEGMENT_BYTES,
    SEGMENT_COLUMNS,
    Affine,
    DecoderWeights,
    Layer,
    Packed12,
    Weight,
)

PACKED_BITS = 12


def parts(weight: Weight) -> tuple:
    """A weight as the raw kernels take it: its tensors, and how many bits it has (0: plain)."""
    if isinstance(weight, Affine):
        return (weight.q, weight.scales, weight.biases, None, None, None, None, weight.bits)
    if isinstance(weight, Packed12):
        escapes = (weight.escape_starts, weight.escape_columns, weight.escape_values)
        return (weight.data, None, None, weight.exponents, *escapes, PACKED_BITS)
    return (weight, None, None, None, None, None, None, 0)


def rows_of(weight: Weight, begin: int, end: int) -> Weight:
    """Rows [begin, end) in the weight's own form."""
    if isinstance(weight, Affine):
        q, scales, biases = (t[begin:end] for t in (weight.q, weight.scales, weight.biases))
        return Affine(q, scales, biases, weight.bits, weight.group_size)
    if isinstance(weight, Packed12):
        starts = weight.escape_starts[begin : end + 1]
        first, last = int(starts[0]), int(starts[-1])
        escapes = weight.escape_columns[first:last], weight.escape_values[first:last]
        data = weight.data[begin:end]
        return Packed12(data, weight.exponents, starts - first, *escapes, weight.columns)
    return weight[begin:end]


def check_weight(name: str, weight: Weight) -> None:
    """The tensors of a weight fit each other."""
    if isinstance(weight, Affine):
        _check_affine(name, weight)
    elif isinstance(weight, Packed12):
        _check_packed(name, weight)
    else:
        floating(name, weight)
        if weight.dim() != 2:
            fail(name, "[n, k]", list(weight.shape))


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device) -> None:
    tensor(name, x)
    if x.dtype != dtype:
        fail(name, dtype, x.dtype, TypeError)
    if tuple(x.shape) != tuple(shape):
        fail(name, list(shape), list(x.shape))
    if x.device != device:
        fail(name, f"on {device}", x.device)
    if not x.is_contiguous():
        fail(name, "contiguous", f"strides {x.stride()}")


def _check_affine(name: str, w: Affine) -> None:
    if w.bits not in BITS:
        fail(f"{name}.bits", " or ".join(map(str, BITS)), w.bits)
    if w.group_size not in GROUP_SIZES:
        fail(f"{name}.group_size", " or ".join(map(str, GROUP_SIZES)), w.group_size)
    tensor(f"{name}.q", w.q)
    if w.q.dim() != 2:
        fail(f"{name}.q", "[n, k bits / 32]", list(w.q.shape))
    n, k = w.shape
    if k % w.group_size:
        fail(f"{name}.q", f"of a multiple of {w.group_size} columns (group_size)", k)
    floating(f"{name}.scales", w.scales)
    _check(f"{name}.q", w.q, torch.uint32, w.q.shape, w.q.device)
    for part, x in (("scales", w.scales), ("biases", w.biases)):
        _check(f"{name}.{part}", x, w.scales.dtype, (n, k // w.group_size), w.q.device)


def _check_packed(name: str, w: Packed12) -> None:
    tensor(f"{name}.data", w.data)
    if w.data.dim() != 3:
        fail(f"{name}.data", f"[n, segments, {SEGMENT_BYTES}]", list(w.data.shape))
    n, segments = w.data.shape[0], -(-w.columns // SEGMENT_COLUMNS)
    device = w.data.device
    _check(f"{name}.data", w.data, torch.uint8, (n, segments, SEGMENT_BYTES), device)
    _check(f"{name}.exponents", w.exponents, torch.uint8, (16,), device)
    _check(f"{name}.escape_starts", w.escape_starts, torch.int32, (n + 1,), device)
    count = w.escape_columns.shape
    _check(f"{name}.escape_columns", w.escape_columns, torch.int32, count, device)
    _check(f"{name}.escape_values", w.escape_values, torch.bfloat16, count, device)


def _projection(name: str, weight: Weight, n: int | None, k: int | None, norm: Tensor) -> None:
    """A projection of one n and k, each of which None leaves open."""
    check_weight(name, weight)
    expected = [b if a is None else a for a, b in zip((n, k), weight.shape, strict=True)]
    if list(weight.shape) != expected:
        fail(name, expected, list(weight.shape))
    if not isinstance(weight, Affine) and weight.dtype != norm.dtype:
        fail(name, f"{norm.dtype} like norm", weight.dtype, TypeError)
    if weight.device != norm.device:
        fail(name, f"on {norm.device} like norm", weight.device)
    if isinstance(weight, Tensor) and weight.stride(-1) != 1:
        fail(name, "of packed rows", f"strides {weight.stride()}")


def _norm(name: str, x: Tensor, n: int, norm: Tensor) -> None:
    check_norm(name, x, n, "norm", norm)
    if x.dtype != norm.dtype:
        fail(name, f"{norm.dtype} like norm", x.dtype, TypeError)
    if not x.is_contiguous():
        fail(name, "contiguous", f"strides {x.stride()}")


def _check_layer(name: str, layer: Layer, weights: DecoderWeights) -> None:
    d, dim, like = weights.head_dim, weights.model_dim, weights.norm
    q_heads, kv_heads = layer.q_heads, layer.kv_heads
    positive(f"{name}.kv_heads", kv_heads)
    positive(f"{name}.q_heads", q_heads)
    if q_heads % kv_heads:
        fail(f"{name}.q_heads", f"a multiple of kv_heads {kv_heads}", q_heads)
    _norm(f"{name}.attn_norm", layer.attn_norm, dim, like)
    _norm(f"{name}.ffn_norm", layer.ffn_norm, dim, like)
    for which, x in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
        if x is not None:
            _norm(f"{name}.{which}", x, d, like)
    _projection(f"{name}.proj_2", layer.proj_2, dim, None, like)
    ffn = layer.proj_2.shape[1]
    _projection(f"{name}.qkv_proj", layer.qkv_proj, (q_heads + 2 * kv_heads) * d, dim, like)
    _projection(f"{name}.out_proj", layer.out_proj, dim, q_heads * d, like)
    _projection(f"{name}.proj_1", layer.proj_1, (2 if weights.gated else 1) * ffn, dim, like)


def check_decoder_weights(weights: DecoderWeights) -> None:
    """The weights of a decoder fit its sizes and each other, in one dtype and on one device."""
    floating("weights.norm", weights.norm)
    if weights.norm.dim() != 1 or not weights.norm.is_contiguous():
        fail("weights.norm", "[model_dim], contiguous", list(weights.norm.shape))
    if weights.head_dim < 2 or weights.head_dim % 2:
        fail("weights.head_dim", "even and positive", weights.head_dim)
    dim, table = weights.model_dim, weights.rope_table
    tensor("weights.rope_table", table)
    length = table.shape[0] if table.dim() else 0
    _check(
        "weights.rope_table", table, torch.float32, (length, weights.head_dim), weights.norm.device
    )
    for name, weight in (("embedding", weights.embedding), ("head", weights.head)):
        _projection(f"weights.{name}", weight, None, dim, weights.norm)
    for i, layer in enumerate(weights.layers):
        _check_layer(f"weights.layers[{i}]", layer, weights)
