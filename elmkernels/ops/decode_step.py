"""decode_step: one token of each sequence through a whole decoder, in one call.

The layers are rows of a table of pointers and sizes, so that layer-wise scaling is data. A kernel
runs all of them in one parallel region or one launch and reads every weight once for the batch. It
rounds where the reference does: at the output of every norm, projection, rotation and addition.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, Traits, choose, define, kernel
from ..checks import fail, integers, positive, values_of, within
from ..derivatives import refuse, refuse_tangents, unusual
from ..weights.checks import check_decoder_weights, check_kinds
from ..weights.formats import Arena, DecoderWeights, form_of
from ..weights.indices import check_shares, read_once
from ..weights.table import table_of
from ._flops import counted, step_fwd
from .linear import MAX_ROWS

MAX_BATCH = MAX_ROWS
_CPU = torch.device("cpu")

define(
    "decode_step",
    # The CUDA one is the only one on a GPU and so what is taken there; it has not been measured
    # on one.
    backends=(*CPU, "cuda"),
    traits=Traits(falls_back=True, whole_model=True),
    fwd=(
        "(Tensor table, Tensor tokens, Tensor positions, Tensor(a!) arena, Tensor offsets, "
        "Tensor rope_table, int max_length, int vocab_size, bool gated, float eps, int model_dim, "
        "int qkv_width, int ffn_dim, Tensor(b!)? chosen) -> Tensor",
        lambda table, tokens, positions, arena, offsets, rope_table, max_length, vocab_size, *_: (
            arena.new_empty((tokens.shape[0], vocab_size))
        ),
    ),
)
counted("decode_step", fwd=step_fwd)


def _check_arena(arena: Arena, weights: DecoderWeights, batch: int) -> None:
    if arena.data.dtype != weights.norm.dtype:
        fail("arena", f"{weights.norm.dtype} like the norms", arena.data.dtype, TypeError)
    if arena.data.device != weights.norm.device:
        fail("arena", f"on {weights.norm.device} like the norms", arena.data.device)
    if arena.data.dim() != 1 or not arena.data.is_contiguous():
        fail("arena.data", "[elements], contiguous", list(arena.data.shape))
    if arena.batch != batch:
        fail("arena", f"of {batch} sequences like tokens", arena.batch)
    layers = len(weights.layers)
    integers("arena.offsets", arena.offsets, _CPU)
    if arena.offsets.shape != (layers, 2):
        fail("arena.offsets", [layers, 2], list(arena.offsets.shape))
    if not arena.offsets.is_contiguous():
        fail("arena.offsets", "contiguous", f"strides {arena.offsets.stride()}")
    if arena.head_dim != weights.head_dim:
        fail("arena.head_dim", weights.head_dim, arena.head_dim)


def _check_shares(arena: Arena, kv_heads: tuple[int, ...]) -> None:
    """Each layer's keys and values lie within the buffer, apart from all others."""
    facts = arena.data.numel(), arena.batch, arena.max_length, arena.head_dim, kv_heads

    def read() -> None:
        positive("arena.max_length", arena.max_length)
        sizes = [arena.batch * n * arena.max_length * arena.head_dim for n in kv_heads]
        check_shares("arena.offsets", arena.offsets, sizes, arena.data.numel())

    read_once((arena.offsets,), read, facts)


def _check(weights: DecoderWeights, tokens: Tensor, positions: Tensor, arena: Arena) -> None:
    if not isinstance(weights, DecoderWeights):
        fail("weights", "DecoderWeights", type(weights).__name__, TypeError)
    if not isinstance(arena, Arena):
        fail("arena", "an Arena", type(arena).__name__, TypeError)
    check_kinds(weights, arena)
    integers("tokens", tokens, arena.data.device)
    integers("positions", positions, arena.data.device)
    if tokens.dim() != 1 or tokens.shape[0] > MAX_BATCH:
        fail("tokens", f"[batch] of at most {MAX_BATCH}", list(tokens.shape))
    if positions.shape != tokens.shape:
        fail("positions", f"{list(tokens.shape)} like tokens", list(positions.shape))
    _check_arena(arena, weights, tokens.shape[0])


def _check_chosen(chosen: Tensor, tokens: Tensor) -> None:
    integers("chosen", chosen, tokens.device)
    if chosen.shape != tokens.shape:
        fail("chosen", f"{list(tokens.shape)} like tokens", list(chosen.shape))
    if not chosen.is_contiguous():
        fail("chosen", "contiguous", f"strides {chosen.stride()}")


def _refuse_derivatives(weights: DecoderWeights, arena: Arena) -> None:
    """A step reads weights by their addresses and writes the arena: nothing follows it there."""
    remedy = 'call it under torch.no_grad(), or with backend="reference"'
    parts = (x for w in weights.weights() for x in form_of(w).parts())
    tensors = [arena.data, *(x for x in parts if isinstance(x, Tensor))]
    wrapped = any(values_of(x) is not x for x in tensors)
    if wrapped or torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse("decode_step", "derivative or vmap", remedy)
    refuse_tangents("decode_step", *tensors)


def decode_step(
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    *,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The next logits of every sequence; the keys and values of its token are written on the way.

    There are no gradients: weights that require one are refused unless under torch.no_grad().

    Args:
        weights: a decoder, as `openelm.decoder_weights_of` gives it; its matrices may be plain,
            `Affine` or `Packed12`. With activations="int8" those that are `Affine` meet rows that
            are rounded to 8 bits (see `linear`); a GPU's kernel doesn't take that.
        tokens: int64 [batch], up to 8 sequences.
        positions: int64 [batch]: row b's token goes to position (and slot) positions[b] and sees
            what is before it.
        arena: the keys and values of the sequences, in the dtype of the norms (`KVCache.arena`).
        chosen: int64 [batch], contiguous, receives the most likely token of each row as
            torch.argmax finds it: the first of the largest, NaN being the largest. It may be
            `tokens` itself.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        logits [batch, vocab_size] in the dtype of the norms.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. The CUDA
            kernel can't raise for a token or position out of range, as nobody waits for it: that
            row's logits are NaN, its chosen token is 0, and its keys and values stay as they were.
        RuntimeError: the named backend can't run here.

    Example:
        >>> weights = decoder_weights_of(model)
        >>> cache = KVCache(model.config, 1, 16, dtype=model.activation_dtype)
        >>> with torch.no_grad():
        ...     logits = elmkernels.decode_step(weights, tokens, cache.lengths, cache.arena)
        >>> cache.advance(1)
    """
    _check(weights, tokens, positions, arena)
    if chosen is not None:
        _check_chosen(chosen, tokens)
    backend = choose("decode_step", arena.data.device.type, backend)
    if backend == REFERENCE or tokens.shape[0] == 0:
        check_decoder_weights(weights)
        _check_shares(arena, tuple(layer.kv_heads for layer in weights.layers))
        within("tokens", tokens, weights.embedding.shape[0], "the vocabulary")
        within("positions", positions, weights.rope_table.shape[0], "rope_table's length")
        within("positions", positions, arena.max_length, "the cache's max_length")
        return reference.decode_step(weights, tokens, positions, arena, chosen)
    if weights.activations is not None and backend not in CPU:
        fail("weights.activations", f"None with the backend {backend!r}", weights.activations)
    if unusual() or torch.is_grad_enabled():
        _refuse_derivatives(weights, arena)
    table = table_of(weights)
    _check_shares(arena, table.kv_heads)
    return kernel("decode_step_fwd", backend)(
        table.rows,
        tokens.contiguous(),
        positions.contiguous(),
        arena.data,
        arena.offsets,
        weights.rope_table,
        arena.max_length,
        weights.vocab_size,
        weights.gated,
        weights.eps,
        weights.model_dim,
        table.qkv_width,
        table.ffn_dim,
        chosen,
    )
