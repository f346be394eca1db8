"""Contrastive search: of the likeliest tokens the one that is least like what came before.

    score(token) = (1 - alpha) p(token) - alpha max over t of cos(h(token), h(t))

h is the last layer's normalized output. transformers 5 keeps its loop for this in a repository of
the Hub, whose code it fetches and runs; this one is here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from ...checks import fail
from .versions import cache_name

CACHE = cache_name()


def wanted(given: Any, default: Any, options: dict[str, Any]) -> bool:
    """Whether `generate` is asked for contrastive search.

    Args:
        given: its GenerationConfig; None for the model's own.
        default: the model's own.
        options: its other arguments, which count before the configuration.
    """

    def value(name: str) -> Any:
        said = options.get(name)
        return getattr(given or default, name, None) if said is None else said

    alpha, top_k = value("penalty_alpha"), value("top_k")
    if alpha is None or alpha <= 0 or top_k is None or top_k < 2:
        return False
    others = ("assistant_model", "prompt_lookup_num_tokens", "do_sample")
    return (value("num_beams") or 1) == 1 and not any(map(value, others))


class _Search:
    """What is known of all rows while their tokens are chosen."""

    def __init__(self, model: Any, input_ids: Tensor, options: dict[str, Any]) -> None:
        mask = options.get("attention_mask")
        self.model = model
        self.mask = torch.ones_like(input_ids) if mask is None else mask.long()
        self.rows = torch.arange(len(input_ids), device=input_ids.device)
        out = self._forward(input_ids, self.mask, options.get(CACHE))
        self.cache, self.logits = out[CACHE], out.logits[:, -1]
        self.states = F.normalize(out.hidden_states[-1].float(), dim=-1)

    def _forward(self, input_ids: Tensor, mask: Tensor, cache: Any) -> Any:
        return self.model(
            input_ids, attention_mask=mask, use_cache=True, output_hidden_states=True,
            **{CACHE: cache},
        )  # fmt: skip

    def choose(self, scores: Tensor, alpha: float, top_k: int) -> Tensor:
        """The next tokens [batch]. All candidates of a row are rows of one forward pass; the cache
        keeps those of the best.
        """
        chances, candidates = scores.softmax(-1).topk(top_k, dim=-1)
        self.cache.batch_repeat_interleave(top_k)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        mask = self.mask.repeat_interleave(top_k, dim=0)
        out = self._forward(candidates.reshape(-1, 1), mask, self.cache)
        states = F.normalize(out.hidden_states[-1].float(), dim=-1)
        states = states.view(len(candidates), top_k, -1)
        likeness = states @ self.states.transpose(1, 2)
        padding = self.mask[:, None, : self.states.shape[1]] == 0
        likeness = likeness.masked_fill(padding, -torch.inf).amax(-1)
        best = ((1 - alpha) * chances - alpha * likeness).argmax(-1)
        kept = self.rows * top_k + best
        self.cache.batch_select_indices(kept)
        self.logits = out.logits[kept, -1]
        self.states = torch.cat((self.states, states[self.rows, best][:, None]), dim=1)
        return candidates[self.rows, best]


def contrastive_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The loop of `generate(penalty_alpha=0.6, top_k=4)`, in the form of its `custom_generate`.

    Args:
        model: an `OpenELMForCausalLM`, or another model of transformers.
        input_ids: int64 [batch, length].
        logits_processor, stopping_criteria: as transformers makes them.
        generation_config: its penalty_alpha and top_k say how tokens are chosen.
        streamer: takes the prompt and each token.
        options: of the forward pass: the cache, the mask of padding.

    Returns:
        int64 [batch, length + new tokens]; with return_dict_in_generate an output that holds them,
        the scores if they are asked for, and the cache.

    Raises:
        ValueError: use_cache is False.

    Example:
        >>> ids = model.generate(prompt, penalty_alpha=0.6, top_k=4, max_new_tokens=20)
    """
    if options.get("use_cache") is False:
        fail("use_cache", "True for contrastive search", False)
    search, kept = _Search(model, input_ids, options), ()
    ends, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while bool(running.any()):
        scores = logits_processor(input_ids, search.logits.float())
        kept += (scores,) if generation_config.output_scores else ()
        tokens = search.choose(scores, generation_config.penalty_alpha, generation_config.top_k)
        if ends is not None:  # a row that has ended is padded
            tokens = torch.where(running, tokens, pad.to(tokens.device))
        input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        running &= ~stopping_criteria(input_ids, kept)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=kept or None, **{CACHE: search.cache}
    )
