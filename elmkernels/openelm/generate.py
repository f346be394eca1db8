"""Greedy decoding: one pass over the prompt, then one token a pass through the cache."""

import torch
from torch import Tensor

from .cache import KVCache
from .model import OpenELM


@torch.inference_mode()
def greedy(
    model: OpenELM,
    input_ids: Tensor,
    steps: int,
    attention_mask: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """input_ids [batch, length], padded on the left where attention_mask is 0 -> the `steps` most
    likely next tokens, int64 [batch, steps]. max_length: the cache's size, prompt + steps if None.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [batch, length] with length > 0, got {list(input_ids.shape)}"
        )
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    batch, length = input_ids.shape
    cache = KVCache(
        model.config,
        batch,
        length + steps if max_length is None else max_length,
        dtype=model.activation_dtype,
        device=input_ids.device,
    )
    tokens = input_ids.new_empty((batch, steps), dtype=torch.int64)
    for step in range(steps):
        logits = model(input_ids, attention_mask, cache, logits_to_keep=1)
        tokens[:, step] = logits[:, -1].argmax(-1)
        input_ids = tokens[:, step : step + 1]
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch, 1)), dim=1)
    return tokens
