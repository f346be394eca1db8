"""One step of decoding, one token a row: by `ops.decode_step` if the model is accelerated (or holds
compressed weights), nothing hangs on its modules that the op would skip, and the batch is one that
it decodes faster (`groups`); else by the model. `greedy` does nothing but steps.
"""

import torch
from torch import Tensor

from ..acceleration.decoder_weights import Snapshot, snapshot_of
from ..checks import integer
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..surgery import given_backend, is_accelerated
from . import groups
from .sampling import check_choices, largest


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
    known = _in_one_call(model, tokens, cache)
    if known is None:
        return model(tokens[:, None], cache=cache, logits_to_keep=1)[:, -1]
    cache.check_room(1)
    logits = groups.step(known.weights, tokens, cache, given_backend(model, "decode_step"))
    cache.advance(1)
    return logits


def _in_one_call(model: OpenELM, tokens: Tensor, cache: KVCache) -> Snapshot | None:
    """The model as data, if `ops.decode_step` computes what the model would."""
    if (
        not isinstance(model, OpenELM)  # torch.compile's wrapper
        or tokens.device.type != "cpu"
        or cache.device.type != "cpu"
        or tokens.shape != (cache.batch,)
        or cache.batch > groups.MOST
        or cache.dtype != model.activation_dtype
        or (cache.kv_heads, cache.head_dim) != (model.config.num_kv_heads, model.config.head_dim)
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))
        or torch.compiler.is_compiling()
    ):
        return None
    model._place_rope_table(tokens.device, cache.length + 1)
    try:
        known = snapshot_of(model)
    except ValueError:
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
