"""Checks of weights in any form, and of whole decoders."""

import torch
from torch import Tensor

from ..checks import fail, floating, integers, number, positive, tensor, truth
from ..checks import weight as check_norm
from .formats import Arena, DecoderWeights, Layer, Weight, check_part, form_of
from .indices import check_shares, read_once


def check_weight(name: str, weight: Weight) -> None:
    """The tensors of a weight fit each other, and what kernels follow in them points inside."""
    form = form_of(weight)
    form.check(name)
    if indices := form.indices:
        read_once(indices, lambda: form.check_numbers(name), weight.shape)


def check_stored(name: str, weight: Weight) -> None:
    """The same of a weight that comes from outside (a file, a state_dict), and that its numbers
    are those of a weight: scales are finite.
    """
    form_of(weight).check(name)
    form_of(weight).check_numbers(name)


def _projection(name: str, weight: Weight, n: int | None, k: int | None, norm: Tensor) -> None:
    """A projection of one n and k, each of which None leaves open."""
    check_weight(name, weight)
    expected = [b if a is None else a for a, b in zip((n, k), weight.shape, strict=True)]
    if list(weight.shape) != expected:
        fail(name, expected, list(weight.shape))
    if not form_of(weight).takes(norm.dtype):
        fail(name, f"{norm.dtype} like norm", weight.dtype, TypeError)
    if weight.device != norm.device:
        fail(name, f"on {norm.device} like norm", weight.device)
    if isinstance(weight, Tensor) and weight.stride(-1) != 1:
        fail(name, "of contiguous rows", f"strides {weight.stride()}")
    _in_memory(name, weight)


def _norm(name: str, x: Tensor, n: int, norm: Tensor) -> None:
    check_norm(name, x, n, "norm", norm)
    if x.dtype != norm.dtype:
        fail(name, f"{norm.dtype} like norm", x.dtype, TypeError)
    if not x.is_contiguous():
        fail(name, "contiguous", f"strides {x.stride()}")
    _in_memory(name, x)


def _in_memory(name: str, weight: Weight) -> None:
    """What is sharded or offloaded may have given its memory back."""
    for x in form_of(weight).parts():
        if isinstance(x, Tensor) and x.numel() and x.untyped_storage().nbytes() == 0:
            fail(name, "in memory", "a tensor whose storage is empty")


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


def check_kinds(weights: DecoderWeights, arena: Arena) -> None:
    """What a step reads of both before it checks them is of its kind; asked at every step."""
    tensor("arena.data", arena.data)
    tensor("weights.norm", weights.norm)
    for name, value in (
        ("weights.head_dim", weights.head_dim),
        ("arena.head_dim", arena.head_dim),
        ("arena.max_length", arena.max_length),
        ("arena.batch", arena.batch),
    ):
        if type(value) is not int:
            positive(name, value)


def check_decoder_weights(weights: DecoderWeights) -> None:
    """The weights of a decoder fit its sizes and each other, in one dtype and on one device."""
    if not isinstance(weights.layers, tuple) or not all(
        isinstance(layer, Layer) for layer in weights.layers
    ):
        kind = type(weights.layers).__name__
        fail("weights.layers", "a tuple of Layer", f"{kind} of other things", TypeError)
    floating("weights.norm", weights.norm)
    number("weights.eps", weights.eps)
    truth("weights.gated", weights.gated)
    positive("weights.head_dim", weights.head_dim)
    if weights.norm.dim() != 1 or not weights.norm.is_contiguous():
        fail("weights.norm", "[model_dim], contiguous", list(weights.norm.shape))
    if weights.head_dim < 2 or weights.head_dim % 2:
        fail("weights.head_dim", "even and positive", weights.head_dim)
    dim, table = weights.model_dim, weights.rope_table
    tensor("weights.rope_table", table)
    length = table.shape[0] if table.dim() else 0
    shape = (length, weights.head_dim)
    check_part("weights.rope_table", table, torch.float32, shape, weights.norm.device)
    for name, weight in (("embedding", weights.embedding), ("head", weights.head)):
        _projection(f"weights.{name}", weight, None, dim, weights.norm)
    for i, layer in enumerate(weights.layers):
        _check_layer(f"weights.layers[{i}]", layer, weights)
    if weights.activations is not None:
        check_activations("weights.activations", weights.activations, *weights.weights())


def check_activations(name: str, activations: str, *weights: Weight) -> None:
    """What a weight is multiplied by may be rounded: one of the weights, at least, takes that."""
    if activations != "int8":
        fail(name, "'int8' or None", repr(activations))
    if not any(form_of(w).takes_int8 for w in weights):
        what = "None with weights that aren't quantized to 8 or 4 bits (Affine)"
        fail(name, what, repr(activations))


def check_arena(arena: Arena, weights: DecoderWeights, tokens: int | None) -> None:
    """An arena fits a decoder, and holds as many sequences as there are tokens: None for any."""
    if arena.data.dtype != weights.norm.dtype:
        fail("arena", f"{weights.norm.dtype} like the norms", arena.data.dtype, TypeError)
    if arena.data.device != weights.norm.device:
        fail("arena", f"on {weights.norm.device} like the norms", arena.data.device)
    if arena.data.dim() != 1 or not arena.data.is_contiguous():
        fail("arena.data", "[elements], contiguous", list(arena.data.shape))
    if tokens is not None and arena.batch != tokens:
        fail("arena", f"of {tokens} sequences like tokens", arena.batch)
    layers = len(weights.layers)
    integers("arena.offsets", arena.offsets, torch.device("cpu"))
    if arena.offsets.shape != (layers, 2):
        fail("arena.offsets", [layers, 2], list(arena.offsets.shape))
    if not arena.offsets.is_contiguous():
        fail("arena.offsets", "contiguous", f"strides {arena.offsets.stride()}")
    if arena.head_dim != weights.head_dim:
        fail("arena.head_dim", weights.head_dim, arena.head_dim)


def check_shares_of(arena: Arena, kv_heads: tuple[int, ...]) -> None:
    """Each layer's keys and values lie within the buffer, apart from all others; read once."""
    facts = arena.data.numel(), arena.batch, arena.max_length, arena.head_dim, kv_heads

    def read() -> None:
        positive("arena.max_length", arena.max_length)
        sizes = [arena.batch * n * arena.max_length * arena.head_dim for n in kv_heads]
        check_shares("arena.offsets", arena.offsets, sizes, arena.data.numel())

    read_once((arena.offsets,), read, facts)
