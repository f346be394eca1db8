"""Models that only look like an OpenELM: CoreNet's calls and Apple's Hugging Face calls.

Stand-ins written for these tests with the module names, signatures and cache conventions of the
two (keys cached normalized but not rotated, the whole cache rotated at every step, key/value heads
repeated), so that the swap meets its users' conventions without their packages.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elmkernels.openelm import OpenELMConfig

from ..golden import load_hf_tiny, load_tiny


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(
            x
        ) * self.weight


class Rotary(nn.Module):
    """Rotates keys by their index and queries as the last of them."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.model_dim = config.head_dim
        self.freq_constant = config.rope_freq_constant
        self.max_seq_length = config.rope_max_length
        exponents = torch.arange(0, self.model_dim, 2) / self.model_dim
        self.register_buffer("inv_freq", self.freq_constant**-exponents, persistent=False)

    def turn(self, x: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + x.shape[-2], dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq.float())
        cos, sin = angles.cos(), angles.sin()
        a, b = x.float().tensor_split(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q, k.shape[-2] - q.shape[-2]), self.turn(k, 0)


class Projection(nn.Module):
    """CoreNet has a linear layer of its own."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(rows, columns)), None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class AttentionParts(nn.Module):
    def __init__(self, config: OpenELMConfig, i: int) -> None:
        super().__init__()
        q, kv, d = config.num_query_heads[i], config.num_kv_heads[i], config.head_dim
        self.layer_idx = i
        self.num_q_heads, self.num_k_heads, self.num_v_heads, self.head_dim = q, kv, kv, d
        self.qkv_proj = nn.Linear(config.model_dim, (q + 2 * kv) * d, bias=False)
        self.pos_embedding = Rotary(config)
        self.q_norm = Norm(d) if config.normalize_qk_projections else None
        self.k_norm = Norm(d) if config.normalize_qk_projections else None
        self.out_proj = nn.Linear(q * d, config.model_dim, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_q_heads, self.num_k_heads, self.num_v_heads), dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        q, k = self.pos_embedding(q, k)
        groups = self.num_q_heads // self.num_k_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, **how)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class CoreNetAttention(AttentionParts):
    def forward(self, x, past_keys=None, past_values=None, use_kv_cache=False, is_causal=True):
        q, k, v = self.split(x)
        if use_kv_cache:
            if past_keys is not None:
                k, v = torch.cat((past_keys, k), -2), torch.cat((past_values, v), -2)
            past_keys, past_values = k, v
        return self.attend(q, k, v, is_causal=is_causal), past_keys, past_values


class FeedForward(nn.Module):
    def __init__(self, config: OpenELMConfig, i: int) -> None:
        super().__init__()
        width = config.ffn_dims[i]
        self.ffn_with_glu, self.act = config.ffn_with_glu, nn.SiLU()
        self.proj_1 = Projection(config.model_dim, width * (1 + config.ffn_with_glu))
        self.proj_2 = Projection(width, config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_1(x)
        if not self.ffn_with_glu:
            return self.proj_2(self.act(x))
        gate, up = x.chunk(2, dim=-1)
        return self.proj_2(self.act(gate) * up)


class LayerParts(nn.Module):
    attention: type[AttentionParts]

    def __init__(self, config: OpenELMConfig, i: int) -> None:
        super().__init__()
        self.attn, self.ffn = self.attention(config, i), FeedForward(config, i)
        self.ffn_norm, self.attn_norm = Norm(config.model_dim), Norm(config.model_dim)


class CoreNetLayer(LayerParts):
    attention = CoreNetAttention

    def forward(self, x, past_keys=None, past_values=None, use_kv_cache=False, is_causal=True):
        y, past_keys, past_values = self.attn(
            self.attn_norm(x), past_keys, past_values, use_kv_cache, is_causal
        )
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), past_keys, past_values


def head(body: "CoreNetModel", x: Tensor) -> Tensor:
    if body.classifier is not None:
        return body.classifier(x)
    return F.linear(x, body.token_embeddings.weight)


class CoreNetModel(nn.Module):
    """Called with ids, or with a dict of ids and the lists of past keys and values."""

    layer: type[LayerParts] = CoreNetLayer

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            self.layer(config, i) for i in range(config.num_transformer_layers)
        )
        self.norm = Norm(config.model_dim)
        tied = config.share_input_output_layers
        self.classifier = (
            None if tied else nn.Linear(config.model_dim, config.vocab_size, bias=False)
        )

    def forward(self, model_input):
        if isinstance(model_input, Tensor):
            x = self.token_embeddings(model_input)
            for layer in self.layers:
                x, _, _ = layer(x)
            return head(self, self.norm(x))
        keys = model_input["past_keys"] or [None] * len(self.layers)
        values = model_input["past_values"] or [None] * len(self.layers)
        keep, causal = model_input["use_kv_cache"], model_input["is_causal"]
        x = self.token_embeddings(model_input["input_ids"])
        out = {"past_keys": [], "past_values": []}
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            x, k, v = layer(x, k, v, keep, causal)
            out["past_keys"].append(k)
            out["past_values"].append(v)
        logits = head(self, self.norm(x))
        return out | {"logits": logits} if keep else logits


class Cache:
    """What the models need of a transformers Cache."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer: int = 0) -> int:
        return self.layers[layer][0].shape[-2] if layer in self.layers else 0

    def update(self, k: Tensor, v: Tensor, layer: int, kwargs: dict) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k, v = torch.cat((past_k, k), -2), torch.cat((past_v, v), -2)
        self.layers[layer] = k, v
        return k, v


class HuggingFaceAttention(AttentionParts):
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
    ):
        q, k, v = self.split(hidden_states)
        if past_key_value is not None:
            kwargs = {"cache_position": cache_position}
            k, v = past_key_value.update(k, v, self.layer_idx, kwargs)
        mask = attention_mask
        if mask is not None and cache_position is not None:
            mask = mask[:, :, cache_position, : k.shape[-2]]
        return self.attend(q, k, v, attn_mask=mask), None, past_key_value


class HuggingFaceLayer(LayerParts):
    attention = HuggingFaceAttention

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
    ):
        delta, weights, present = self.attn(
            hidden_states=self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
        )
        x = hidden_states + delta
        outputs = (x + self.ffn(self.ffn_norm(x)),)
        if output_attentions:
            outputs += (weights,)
        return (*outputs, present) if use_cache else outputs


class HuggingFaceModel(nn.Module):
    """The body under `transformer`, an additive mask made from the padding, a Cache if given: its
    body and its forward are neither Apple's nor like them (see `remote_code` for such).
    """

    class Body(CoreNetModel):
        layer = HuggingFaceLayer

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.transformer = self.Body(config)
        self.reach = config.max_context_length

    def forward(self, input_ids, attention_mask=None, cache=None):
        x = self.transformer.token_embeddings(input_ids)
        past = cache.get_seq_length() if cache is not None else 0
        cache_position = torch.arange(past, past + input_ids.shape[1])
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((self.reach, self.reach), lowest, dtype=x.dtype).triu(1)[None, None]
        mask = mask.repeat(x.shape[0], 1, 1, 1)
        if attention_mask is not None:
            padding = attention_mask[:, None, None, :].eq(0)
            seen = padding.shape[-1]
            mask[..., :seen] = mask[..., :seen].masked_fill(padding, lowest)
        for layer in self.transformer.layers:
            x, *_ = layer(
                x,
                attention_mask=mask,
                past_key_value=cache,
                use_cache=cache is not None,
                cache_position=cache_position,
            )
        return head(self.transformer, self.transformer.norm(x))


def corenet() -> CoreNetModel:
    """With golden weights."""
    case = load_tiny("tiny_layerwise")
    model = CoreNetModel(case.config)
    model.load_state_dict(case.weights)
    return model


def hugging_face() -> HuggingFaceModel:
    """With golden weights."""
    case = load_hf_tiny()
    model = HuggingFaceModel(case.config)
    model.transformer.load_state_dict(case.weights)
    return model
