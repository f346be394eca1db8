"""decode_step: the next tokens of each sequence through a whole decoder, in one call.

The layers are rows of a table of pointers and sizes, so that layer-wise scaling is data. A kernel
runs all of them in one parallel region or one launch and reads every weight once for the batch. It
rounds where the reference does: at the output of every norm, projection, rotation and addition. A
kernel gives a token the same bits alone and among others, of its sequence or of other ones.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, Traits, choose, define, kernel
from ..checks import fail, integers, values_of, within
from ..derivatives import refuse, refuse_tangents, unusual
from ..weights.checks import check_arena, check_decoder_weights, check_kinds, check_shares_of
from ..weights.formats import Arena, DecoderWeights, form_of
from ..weights.indices import check_runs
from ..weights.table import table_of
from ._flops import counted, step_fwd
from .linear import MAX_ROWS

MAX_BATCH = MAX_ROWS

define(
    "decode_step",
    # The CUDA one is the only one on a GPU and so what is taken there; it has not been measured
    # on one.
    backends=(*CPU, "cuda"),
    traits=Traits(falls_back=True, whole_model=True),
    fwd=(
        "(Tensor table, Tensor tokens, Tensor positions, Tensor? sequences, Tensor(a!) arena, "
        "Tensor offsets, Tensor rope_table, int max_length, int vocab_size, bool gated, float eps, "
        "int model_dim, int qkv_width, int ffn_dim, int batch, Tensor(b!)? chosen) -> Tensor",
        lambda table, tokens, positions, sequences, arena, offsets, rope, max_length, vocab, *_: (
            arena.new_empty((tokens.shape[0], vocab))
        ),
    ),
)
counted("decode_step", fwd=step_fwd)


def _check(
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    sequences: Tensor | None,
    chosen: Tensor | None,
) -> None:
    if not isinstance(weights, DecoderWeights):
        fail("weights", "DecoderWeights", type(weights).__name__, TypeError)
    if not isinstance(arena, Arena):
        fail("arena", "an Arena", type(arena).__name__, TypeError)
    check_kinds(weights, arena)
    integers("tokens", tokens, arena.data.device)
    if tokens.dim() != 1 or tokens.shape[0] > MAX_BATCH:
        fail("tokens", f"[n] of at most {MAX_BATCH}", list(tokens.shape))
    integers("positions", positions, arena.data.device)
    for name, x in (("positions", positions), ("sequences", sequences), ("chosen", chosen)):
        if x is None:
            continue
        integers(name, x, arena.data.device)
        if x.shape != tokens.shape:
            fail(name, f"{list(tokens.shape)} like tokens", list(x.shape))
    if chosen is not None and not chosen.is_contiguous():
        fail("chosen", "contiguous", f"strides {chosen.stride()}")
    check_arena(arena, weights, tokens.shape[0] if sequences is None else None)


def _refuse_derivatives(weights: DecoderWeights, arena: Arena) -> None:
    """A step reads weights by their addresses and writes the arena: nothing follows it there."""
    remedy = 'call it under torch.no_grad(), or with backend="reference"'
    parts = (x for w in weights.weights() for x in form_of(w).parts())
    tensors = [arena.data, *(x for x in parts if isinstance(x, Tensor))]
    wrapped = any(values_of(x) is not x for x in tensors)
    if wrapped or torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse("decode_step", "derivative or vmap", remedy)
    refuse_tangents("decode_step", *tensors)


def _by_reference(
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    sequences: Tensor | None,
    chosen: Tensor | None,
) -> Tensor:
    check_decoder_weights(weights)
    check_shares_of(arena, tuple(layer.kv_heads for layer in weights.layers))
    within("tokens", tokens, weights.embedding.shape[0], "the vocabulary")
    within("positions", positions, weights.rope_table.shape[0], "rope_table's length")
    within("positions", positions, arena.max_length, "the cache's max_length")
    return reference.decode_step(weights, tokens, positions, arena, sequences, chosen)


def decode_step(
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    *,
    sequences: Tensor | None = None,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logits after every token; its keys and values are written on the way. There are no
    gradients: weights that require one are refused unless under torch.no_grad().

    Args:
        weights: a decoder, as `openelm.decoder_weights_of` gives it. With activations="int8" its
            `Affine` matrices meet rows rounded to 8 bits (see `linear`), but not on a GPU.
        tokens: int64 [n], up to 8, of one sequence or of several.
        positions: int64 [n]: token i goes to position (and slot) positions[i] of its sequence and
            sees what is before it, tokens of this call among them.
        arena: the keys and values of the sequences, in the dtype of the norms (`KVCache.arena`).
        sequences: int64 [n], on the arena's device: to which sequence of the arena each token
            belongs. Those of one are neighbours, at ascending positions without a gap; another may
            have more, fewer or none. None: token i is that of sequence i of n.
        chosen: int64 [n], contiguous, receives the most likely token after each one as
            torch.argmax finds it: the first of the largest, NaN being the largest. It may be
            `tokens` itself.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        logits [n, vocab_size] in the dtype of the norms. A kernel gives a token's logits, keys and
        values the same bits as if tokens came one by one.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. The CUDA
            kernel can't raise for a token, position or sequence that is wrong, as nobody waits for
            it: that token's logits and those of its sequence's later ones are NaN, their chosen
            tokens are 0, and their keys and values stay as they were.
        RuntimeError: the named backend can't run here.

    Example:
        >>> weights = decoder_weights_of(model)
        >>> cache = KVCache(model.config, 1, 16, dtype=model.activation_dtype)
        >>> with torch.no_grad():
        ...     logits = elmkernels.decode_step(weights, tokens, cache.lengths, cache.arena)
        >>> cache.advance(1)
        >>> places, row = cache.lengths + torch.arange(3), torch.zeros(3, dtype=torch.int64)
        >>> with torch.no_grad():  # three tokens of the only sequence
        ...     logits = elmkernels.decode_step(weights, row, places, cache.arena, sequences=row)
    """
    _check(weights, tokens, positions, arena, sequences, chosen)
    device = arena.data.device.type
    backend = choose("decode_step", device, backend)
    if sequences is not None and (device == "cpu" or backend == REFERENCE):
        check_runs(sequences, positions, arena.batch)
    if backend == REFERENCE or tokens.shape[0] == 0:
        return _by_reference(weights, tokens, positions, arena, sequences, chosen)
    if weights.activations is not None and backend not in CPU:
        fail("weights.activations", f"None with the backend {backend!r}", weights.activations)
    if unusual() or torch.is_grad_enabled():
        _refuse_derivatives(weights, arena)
    table = table_of(weights)
    check_shares_of(arena, table.kv_heads)
    return kernel("decode_step_fwd", backend)(
        table.rows,
        tokens.contiguous(),
        positions.contiguous(),
        None if sequences is None else sequences.contiguous(),
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
        arena.batch,
        chosen,
    )
