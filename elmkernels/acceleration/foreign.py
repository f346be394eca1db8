"""The fused classes of the two foreign conventions: CoreNet's, and Apple's Hugging Face code.

Both rotate their whole cache at every step; here keys are stored rotated, which gives the same
attention, so a cache belongs to the model as it was, accelerated or not, when it was filled.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..openelm.layers import norms_called
from ..reference import rope_table
from ..surgery import untouched
from .classes import while_fused
from .fused import (
    AttentionParts,
    AttentionState,
    LayerParts,
    add_feed_forward,
    plain_norm,
    rotated,
    takes,
)
from .masks import Masks


@dataclass
class ForeignState(AttentionState):
    """rotary: the class of the module that rotates, known by its parts. The table is float32,
    whatever the model is cast to.
    """

    rope_base: float
    rope_length: int
    rotary: type[nn.Module]
    table: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    masks: Masks | None = None  # of its body, if that keeps them

    def rotation(self, length: int, head_dim: int, device: torch.device) -> Tensor:
        """The table for positions below `length`, on a device."""
        if self.table.device != device or self.table.shape[0] < length:
            with torch.inference_mode(False):
                rows = max(length, self.rope_length)
                self.table = rope_table(rows, head_dim, self.rope_base).to(device)
        return self.table


class _ForeignAttention(AttentionParts):
    """Attention of a model that has its own RotaryEmbedding in every layer. What it shares are
    functions: no method may stand before one that the own forward calls.
    """

    pos_embedding: nn.Module


def _applies(attn: _ForeignAttention, x: Tensor) -> bool:
    """Whether the fused forward gives what the module's own does."""
    rotary = attn.pos_embedding
    if (attn.q_norm is None) != (attn.k_norm is None):
        return False
    return takes(x) and type(rotary) is attn._fused.rotary and untouched(rotary)


def _one_kernel(q_norm: Any, k_norm: Any, qkv: Tensor) -> bool:
    """Whether a kernel may compute both norms: nothing hangs on them, and they are alike."""
    if not (plain_norm(q_norm, qkv) and plain_norm(k_norm, qkv)):
        return False
    return q_norm.eps == k_norm.eps and q_norm.weight.dtype == k_norm.weight.dtype


def _project(
    attn: _ForeignAttention, x: Tensor, positions: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x -> q [batch, l, q_heads, head_dim], k and v [batch, kv_heads, l, head_dim]."""
    state: ForeignState = attn._fused
    qkv, q_norm, k_norm = attn.qkv_proj(x), attn.q_norm, attn.k_norm
    normed, eps = (qkv, None, None), 1e-6
    if q_norm is not None and _one_kernel(q_norm, k_norm, qkv):
        normed, eps = (qkv, q_norm.weight, k_norm.weight), q_norm.eps
    elif q_norm is not None:
        normed = norms_called(q_norm, k_norm, qkv, state.q_heads, state.kv_heads), None, None
    table = state.rotation(length, attn.head_dim, x.device)
    q, k, v = rotated(attn, normed, positions, table, eps)
    return q, k.transpose(1, 2), v.transpose(1, 2)


def _attend(
    attn: _ForeignAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """q [batch, lq, q_heads, head_dim], k and v [batch, kv_heads, lk, head_dim]."""
    if mask is None and (causal or q.shape[1] == 1):
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        out = ops.attention(q, k, v, backend=attn._fused.attention_backend)
    else:
        # The owner's own mask, added or boolean, is kept as it is.
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
    return attn.out_proj(out.flatten(-2))


class FusedCoreNetAttention(_ForeignAttention):
    """CoreNet's: past_keys, past_values [batch, kv_heads, past, head_dim] in, longer ones out."""

    @while_fused
    def forward(
        self,
        x: Tensor,
        past_keys: Tensor | None = None,
        past_values: Tensor | None = None,
        use_kv_cache: bool = False,
        is_causal: bool = True,
        concat_kvs: bool = True,
        apply_k_norm_to_past_keys_before_cache_write: bool = False,
        apply_k_norm_before_cache_write: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if (
            not concat_kvs
            or apply_k_norm_to_past_keys_before_cache_write
            or not apply_k_norm_before_cache_write
        ):
            raise RuntimeError(
                "the accelerated attention appends normalized keys to the cache; concat_kvs=False "
                "and the other orders of k_norm are not supported: elmkernels.restore(model) first"
            )
        if not _applies(self, x):
            return super().forward(x, past_keys, past_values, use_kv_cache, is_causal)
        length = x.shape[1]
        past = past_keys.shape[2] if use_kv_cache and past_keys is not None else 0
        positions = torch.arange(past, past + length, device=x.device)
        q, k, v = _project(self, x, positions, past + length)
        if use_kv_cache:
            if past and past_keys is not None and past_values is not None:
                k, v = torch.cat((past_keys, k), dim=2), torch.cat((past_values, v), dim=2)
            past_keys, past_values = k, v
        return _attend(self, q, k, v, None, is_causal), past_keys, past_values


class FusedCoreNetLayer(LayerParts):
    """The layer of CoreNet's models."""

    @while_fused
    def forward(
        self, x: Tensor, past_keys: Any = None, past_values: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any, Any]:
        delta, past_keys, past_values = self.attn(
            self.attn_norm(x), past_keys, past_values, *args, **kwargs
        )
        return add_feed_forward(self, delta, x), past_keys, past_values


class FusedHuggingFaceAttention(_ForeignAttention):
    """Apple's Hugging Face code: keys and values go through a transformers Cache object."""

    @while_fused
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, None, Any]:
        if not _applies(self, hidden_states):
            return super().forward(
                hidden_states, attention_mask, past_key_value, output_attentions, use_cache,
                cache_position,
            )  # fmt: skip
        index = getattr(self, "layer_idx", self._fused.index)  # its own, wherever it is moved to
        length, device = hidden_states.shape[1], hidden_states.device
        past_key_value = getattr(self, "past_key_value", past_key_value)
        past = 0 if past_key_value is None else int(past_key_value.get_seq_length(index))
        positions = cache_position
        if positions is None:
            positions = torch.arange(past, past + length, device=device)
        q, k, v = _project(self, hidden_states, positions, past + length)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, index, {"cache_position": cache_position})
        mask, masks = attention_mask, self._fused.masks
        # A static cache is longer than what it holds.
        if masks is not None and k.shape[2] == past + length:
            if masks.causal(mask, cache_position, past):
                return _attend(self, q, k, v, None, True), None, past_key_value
        if mask is not None and cache_position is not None:
            mask = mask[:, :, cache_position, : k.shape[2]]
        return _attend(self, q, k, v, mask, False), None, past_key_value


class FusedHuggingFaceLayer(LayerParts):
    """The layer of Apple's Hugging Face code."""

    @while_fused
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        delta, weights, past_key_value = self.attn(
            hidden_states=self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
            **kwargs,
        )
        outputs = (add_feed_forward(self, delta, hidden_states),)
        if output_attentions:
            outputs += (weights,)
        return (*outputs, past_key_value) if use_cache else outputs
