"""A model with the names, calls and outputs of Apple's whole Hugging Face code.

Its layers are those of `foreign`; body, mask, head, loss and outputs are written for these tests.
"""

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from elmkernels.openelm import OpenELMConfig

from ..golden import load_hf_tiny
from . import HuggingFaceLayer, Norm


class Read:
    """An output that is read by name, by place, and by attribute."""

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if vars(self).get(f.name) is not None]

    def to_tuple(self) -> tuple:
        return tuple(vars(self)[name] for name in self.keys())

    def __getitem__(self, key: Any) -> Any:
        return vars(self)[key] if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class BodyOutput(Read):
    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class Output(Read):
    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


class Body(nn.Module):
    def __init__(self, config: OpenELMConfig, settings: Any) -> None:
        super().__init__()
        n = config.max_context_length
        self.config, self.gradient_checkpointing = settings, False
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            HuggingFaceLayer(config, i) for i in range(config.num_transformer_layers)
        )
        self.norm = Norm(config.model_dim)
        self.register_buffer("causal_mask", torch.ones(n, n).triu(1).bool(), persistent=False)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, use_cache=None, output_attentions=None, output_hidden_states=None,
        return_dict=None, cache_position=None,
    ):  # fmt: skip
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if use_cache else None
        if cache_position is None:
            past = cache.get_seq_length() if cache is not None else 0
            cache_position = torch.arange(past, past + x.shape[1])
        mask, states = self._update_causal_mask(attention_mask, x), []
        for layer in self.layers:
            states.append(x)
            given = mask, None, cache, False, cache is not None, cache_position
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, *given, use_reentrant=False)[0]
            else:
                x = layer(x, *given)[0]
        states = (*states, self.norm(x))
        states = states if output_hidden_states else None
        out = BodyOutput(self.norm(x), cache, states, (None,) if output_attentions else None)
        return out if return_dict else out.to_tuple()

    def _update_causal_mask(self, attention_mask, input_tensor):
        lowest, (batch, length) = torch.finfo(input_tensor.dtype).min, input_tensor.shape[:2]
        if length > self.causal_mask.shape[0]:
            wider = torch.ones(2 * length, 2 * length).triu(1).bool()
            self.register_buffer("causal_mask", wider, persistent=False)
        n = self.causal_mask.shape[0]
        mask = input_tensor.new_zeros(batch, 1, n, n).masked_fill(self.causal_mask, lowest)
        if attention_mask is not None and attention_mask.dim() == 2:
            seen = attention_mask.shape[1]
            mask[..., :seen].masked_fill_(attention_mask[:, None, None] == 0, lowest)
            if self.config._attn_implementation == "sdpa":
                mask = mask.masked_fill((mask == lowest).all(-1, keepdim=True), 0)
        return mask


class Model(nn.Module):
    def __init__(self, config: OpenELMConfig, tied: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=config.vocab_size, output_attentions=False, output_hidden_states=False,
            use_return_dict=True, _attn_implementation="eager",
        )  # fmt: skip
        self.transformer = Body(config, self.config)
        self.lm_head = None if tied else nn.Linear(config.model_dim, config.vocab_size, bias=False)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, cache_position=None,
    ):  # fmt: skip
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        wanted = {
            "output_attentions": self.config.output_attentions
            if output_attentions is None else output_attentions,
            "output_hidden_states": self.config.output_hidden_states
            if output_hidden_states is None else output_hidden_states,
        }  # fmt: skip
        out = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            return_dict=return_dict, cache_position=cache_position, **wanted,
        )  # fmt: skip
        weight = self.transformer.token_embeddings.weight
        logits = F.linear(out[0], weight) if self.lm_head is None else self.lm_head(out[0])
        loss = None
        if labels is not None:
            rows = logits[:, :-1].reshape(-1, self.config.vocab_size)
            loss = F.cross_entropy(rows, labels[:, 1:].reshape(-1))
        if not return_dict:
            return (() if loss is None else (loss,)) + (logits,) + tuple(out[1:])
        return Output(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


def remote_code(tied: bool = True) -> Model:
    """With golden weights, and a head of its own unless it is tied."""
    case = load_hf_tiny()
    model = Model(case.config, tied)
    model.transformer.load_state_dict(case.weights)
    if model.lm_head is not None:
        generator = torch.Generator().manual_seed(1)
        nn.init.normal_(model.lm_head.weight, std=0.1, generator=generator)
    return model.eval()
