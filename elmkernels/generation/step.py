"""One step of decoding, of a token a row or of several: by `ops.decode_step` if the model is
accelerated (or holds compressed weights), nothing hangs on its modules that the op would skip, and
the batch is one that it decodes faster (`groups`); else by the model. `greedy` does nothing but
steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..acceleration.decoder_weights import Snapshot, snapshot_of
from ..checks import integer
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..ops.decode_step import MAX_BATCH
from ..surgery import given_backend, is_accelerated
from . import groups
from .sampling import argmax, check_choices, largest, unless_nan

MOST_TOKENS = MAX_BATCH  # of one call, of all rows together


def new_cache(
    model: OpenELM, batch: int, max_length: int | None, device: torch.device | None = None
) -> KVCache:
    """A cache for a model, in the dtype of the keys that its first pass gives: a model whose
    forward is wrapped tells it only there. device: None for that of the model.
    """
    device = model.norm.weight.device if device is None else device
    cache = KVCache(model.config, batch, max_length, dtype=model.activation_dtype, device=device)
    cache.follows = True
    return cache


def next_logits(model: OpenELM, tokens: Tensor, cache: KVCache) -> Tensor:
    """One step of decoding; the cache then holds one token more a row.

    Args:
        model: the model, accelerated or not.
        tokens: int64 [batch], each after those that its row of the cache holds.
        cache: a KVCache of the same batch.

    Returns:
        logits [batch, vocab_size].

    Raises:
        ValueError: the cache is full, or is of another model.

    Example:
        >>> with torch.inference_mode():
        ...     logits = next_logits(model, tokens, cache)
        >>> tokens = logits.argmax(-1)
    """
    there = tokens.shape == (cache.batch,) and tokens.device.type == "cpu"
    known = in_one_call(model, cache, most=groups.MOST) if there else None
    if known is None:
        return model(tokens[:, None], cache=cache, logits_to_keep=1)[:, -1]
    cache.check_room(1)
    logits = groups.step(known.weights, tokens, cache, given_backend(model, "decode_step"))
    cache.advance(1)
    return logits


def several_logits(model: OpenELM, tokens: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """One pass over the next tokens of each row, which may be none; the cache then holds them.

    Args:
        model: the model, accelerated or not.
        tokens: of each row of the cache, at least one in all.
        cache: a KVCache of as many rows, with room for as many tokens as the longest has, after
            every row.

    Returns:
        logits [tokens in all, vocab_size], those of row 0 first.

    Example:
        >>> with torch.inference_mode():
        ...     logits = several_logits(model, [[5, 7, 2], [], [9]], cache)
        >>> len(logits), cache.rows
        (4, [3, 0, 1])
    """
    return _several(model, tokens, cache, None)


def several_greedy(model: OpenELM, tokens: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """The largest of `several_logits`: tokens, int64 [tokens in all], -1 for NaN."""
    chosen = torch.empty(sum(map(len, tokens)), dtype=torch.int64, device=cache.device)
    logits = _several(model, tokens, cache, chosen)
    return unless_nan(chosen, logits)


def _several(
    model: OpenELM, tokens: Sequence[Sequence[int]], cache: KVCache, chosen: Tensor | None
) -> Tensor:
    """`several_logits`; chosen receives where torch.argmax finds the largest."""
    counts = list(map(len, tokens))
    width, device = max(counts), cache.device
    known = in_one_call(model, cache, width) if sum(counts) <= MOST_TOKENS else None
    if known is not None:
        cache.check_room(counts)
        place = _place(tokens, cache.rows)
        ids, positions, sequences = torch.tensor(place).unbind(1)
        logits = ops.decode_step(
            known.weights, ids, positions, cache.arena, sequences=sequences, chosen=chosen,
            backend=given_backend(model, "decode_step"),
        )  # fmt: skip
        cache.advance(counts)
        return logits
    if width == min(counts) == 1:
        logits = next_logits(model, torch.tensor(tokens, device=device)[:, 0], cache)
    else:
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], device=device)
        padded = model(ids, cache=cache, counts=counts)
        logits = torch.cat([padded[b, :n] for b, n in enumerate(counts) if n])
    if chosen is not None:
        chosen.copy_(argmax(logits))
    return logits


def _place(tokens: Sequence[Sequence[int]], held: Sequence[int]) -> list[tuple[int, int, int]]:
    """(token, position, sequence) of each, as `ops.decode_step` takes them."""
    return [(token, held[b] + i, b) for b, row in enumerate(tokens) for i, token in enumerate(row)]


def go_on_greedily(
    model: OpenELM, tokens: Sequence[Sequence[int]], cache: KVCache, steps: int
) -> Tensor | None:
    """Steps of some rows, of which nothing is read until the last; nothing is counted. For what no
    NaN is looked for in: guesses.

    Args:
        model: the model, accelerated or not.
        tokens: of each row of the cache, those that the first step reads; at most MOST_TOKENS.
        cache: a KVCache of as many rows, with room for the steps.
        steps: how many: each gives one token of each row that has any.

    Returns:
        int64 [steps, rows with tokens], or None if no single call is a step.
    """
    counts = [len(row) for row in tokens if row]
    known = in_one_call(model, cache, max(counts) + steps - 1)
    if known is None:
        return None
    ids, positions, sequences = torch.tensor(_place(tokens, cache.rows)).t().contiguous()
    found, backend = ids.new_empty(steps, len(counts)), given_backend(model, "decode_step")
    for step in range(steps):
        chosen = found[step] if len(ids) == len(counts) else torch.empty_like(ids)
        ops.decode_step(
            known.weights, ids, positions, cache.arena, sequences=sequences, chosen=chosen,
            backend=backend,
        )  # fmt: skip
        if len(ids) != len(counts):
            last = torch.tensor(counts).cumsum(0) - 1
            positions, sequences, found[step] = positions[last], sequences[last], chosen[last]
        ids = found[step]
        positions += 1
    return found


def prefill(
    model: OpenELM, ids: Sequence[Sequence[int]], cache: KVCache, chunk: int, decoder: Any = None
) -> Tensor:
    """Run what the cache doesn't hold of ids, one row's or more.

    Args:
        model: the model, accelerated or not.
        ids: of each row all tokens; it may hold every one of them already.
        cache: a KVCache of as many rows.
        chunk: how many at a time.
        decoder: a `gpu_decoder.Decoder` of model and cache, which takes short prompts; or None.

    Returns:
        The logits after each row's last, [batch, vocab_size]; of a row without any, of no meaning.
    """
    logits: Tensor | None = None
    device = cache.device
    while True:
        rows = cache.rows
        missing = [len(row) - held for row, held in zip(ids, rows, strict=True)]
        # Rows are padded to one width, which must fit after each of them.
        width = min(chunk, max(missing), cache.max_length - max(rows))
        counts = [min(n, width) for n in missing]
        padded = None if decoder is None else decoder.width_for(width)
        parts = [
            [*row[held : held + n], *[0] * ((padded or width) - n)]
            for row, held, n in zip(ids, rows, counts, strict=True)
        ]
        new = torch.tensor(parts, dtype=torch.int64, device=device)
        if decoder is not None and padded is not None:
            last = decoder.prefill(new, counts)
            cache.advance(counts)
        elif width == 1 and min(counts) == 1:
            last = next_logits(model, new[:, 0], cache)
        else:
            last = model(new, cache=cache, logits_to_keep=1, counts=counts)[:, -1]
        if logits is not None and min(counts) == 0:
            going = torch.tensor([n > 0 for n in counts], device=device)
            last = torch.where(going[:, None], last, logits)
        if width == max(missing):
            return last
        logits = last


def in_one_call(
    model: OpenELM, cache: KVCache, width: int = 1, most: int = MAX_BATCH
) -> Snapshot | None:
    """The model as data, if `ops.decode_step` computes what the model would. width: the most tokens
    of a row that it is asked for; most: of how many rows.
    """
    if (
        not isinstance(model, OpenELM)  # torch.compile's wrapper
        or cache.device.type != "cpu"
        or cache.batch > most
        or cache.dtype != model.activation_dtype
        or (cache.kv_heads, cache.head_dim) != (model.config.num_kv_heads, model.config.head_dim)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    model._place_rope_table(cache.device, cache.length + width)
    try:
        known = snapshot_of(model)
    except ValueError:
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return None
    wanted = known.compressed or is_accelerated(model)
    fits = known.dtypes == {cache.dtype} and len(known.weights.layers) == len(cache.kv_heads)
    fits = fits and groups.grouped(model, known.weights, cache.batch)
    return known if wanted and fits else None


@torch.inference_mode()
def greedy(
    model: OpenELM,
    input_ids: Tensor,
    steps: int,
    attention_mask: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """The most likely next tokens. On a GPU no step waits for the one before: nothing is read back
    until all are chosen.

    Args:
        model: the model, accelerated or not.
        input_ids: integers [batch, length], length > 0.
        steps: how many tokens.
        attention_mask: [batch, length], 0 for padding, which is on the left; None for none.
        max_length: the cache's size; None for the prompt and the steps.

    Returns:
        int64 [batch, steps].

    Raises:
        ValueError: input_ids or steps is out of its range; or logits were NaN.

    Example:
        >>> greedy(model, torch.tensor([[1, 2, 3]]), 20)
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [batch, length] with length > 0, got {list(input_ids.shape)}"
        )
    steps = integer("steps", steps, 0)
    batch, length = input_ids.shape
    room = length + steps if max_length is None else max_length
    cache = new_cache(model, batch, room, input_ids.device)
    tokens = input_ids.new_empty((batch, steps), dtype=torch.int64)
    if not steps:
        return tokens
    tokens[:, 0] = chosen = largest(
        model(input_ids, attention_mask, cache, logits_to_keep=1)[:, -1]
    )
    for step in range(1, steps):
        chosen = chosen.clamp(min=0)  # a choice that failed is raised at the end
        if attention_mask is None:
            logits = next_logits(model, chosen, cache)
        else:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch, 1)), dim=1)
            logits = model(chosen[:, None], attention_mask, cache, logits_to_keep=1)[:, -1]
        tokens[:, step] = chosen = largest(logits)
    check_choices(tokens.amin(-1).tolist())
    return tokens
