"""The modules that `accelerate` puts in: fused ops around the original's own projections.

Each keeps the child modules (so the parameter names and the Parameters) and the call signature of
what it replaces. There are three signatures: this package's model (`Context`), CoreNet's
(past_keys and past_values in and out) and Apple's Hugging Face code (a Cache object). The last two
rotate their whole cache at every step; here keys are stored rotated, which gives the same
attention, so a cache belongs to the model as it was, accelerated or not, when it was filled.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..derivatives import unusual
from ..devices import autocast_dtype
from ..openelm.documents import in_one_row
from ..openelm.layers import Context, LogitsHead
from ..openelm.loss import LossHead, plain_weight
from ..openelm.shared_weight import TiedWeightGradient
from ..reference import rope_table
from . import recompute, small_batch


def _projected(x: Tensor) -> torch.dtype:
    """The dtype in which a projection takes x: autocast's if it is on."""
    return autocast_dtype(x.device.type) or x.dtype


def _narrowed(x: Tensor) -> Tensor:
    return x.to(_projected(x))


def adopt(module: nn.Module, original: nn.Module) -> None:
    """Register the original's children under their names, in their order."""
    for name, child in original._modules.items():
        module.add_module(name, child)


class FusedRMSNorm(nn.Module):
    """Any RMSNorm with `weight` and `eps`."""

    def __init__(self, original: nn.Module, backend: str | None) -> None:
        super().__init__()
        self.weight, self.eps, self.backend = original.weight, original.eps, backend

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, backend={self.backend}"


class FusedFeedForward(nn.Module):
    """proj_2(swiglu(proj_1(x))), or with a plain SiLU if there is no gate."""

    def __init__(self, original: nn.Module, gated: bool, backend: str | None) -> None:
        super().__init__()
        adopt(self, original)
        self.gated, self.backend = gated, backend

    def forward(self, x: Tensor, make: Callable[[], Tensor] | None = None) -> Tensor:
        """make gives x again in the backward pass (see `recompute`); the gated activation is then
        made again too.
        """
        x = recompute.apply(self.proj_1, x, make)
        if not self.gated:
            return self.proj_2(F.silu(x))
        kept = x.detach()

        def activation() -> Tensor:
            return ops.swiglu(kept, backend=self.backend)

        again = None if make is None else activation
        return recompute.apply(self.proj_2, ops.swiglu(x, backend=self.backend), again)


class FusedLogitsHead(LogitsHead):
    """Norm and projection of few rows in one product, if there is a kernel (see `small_batch`).
    backend: of `ops.linear`.
    """

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        logits = small_batch.logits(model, x, self.backend)
        return super().forward(model, x) if logits is None else logits


class FusedLossHead(LossHead):
    """The projection and its loss in one op, if the projection is a plain matrix."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def shared_gradient(self, embedding: nn.Module) -> TiedWeightGradient | None:
        weight = plain_weight(embedding)
        if (
            weight is None
            or not (weight.requires_grad and torch.is_grad_enabled())
            or torch.compiler.is_compiling()  # its graph has no room for a gradient that waits
            or unusual()  # nor has a transform
            or embedding.sparse
            or embedding.scale_grad_by_freq
            or embedding.max_norm is not None
        ):
            return None
        return TiedWeightGradient(weight, embedding.padding_idx)

    def forward(self, hidden, targets, weight, project, **options) -> Tensor:
        if weight is None:
            return super().forward(hidden, targets, weight, project, **options)
        return ops.linear_cross_entropy(hidden, weight, targets, backend=self.backend, **options)


class FusedAttention(nn.Module):
    """Attention of this package's model. backend: of `ops.qk_norm_rope`."""

    def __init__(
        self, original: nn.Module, index: int, q_heads: int, kv_heads: int,
        backend: str | None, attention_backend: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        adopt(self, original)
        if original.q_norm is None:
            self.q_norm = self.k_norm = None
        self.layer_index, self.q_heads, self.kv_heads = index, q_heads, kv_heads
        self.head_dim = original.head_dim
        self.eps = 1e-6 if self.q_norm is None else self.q_norm.eps
        self.backend = backend
        self.attention_backend = attention_backend

    def extra_repr(self) -> str:
        return f"q_heads={self.q_heads}, kv_heads={self.kv_heads}, backend={self.backend}"

    def project(self, qkv: Tensor, positions: Tensor, table: Tensor, **cache) -> tuple:
        """qkv_proj's output [batch, length, ...] -> q, k, v (see `ops.qk_norm_rope`)."""
        return ops.qk_norm_rope(
            qkv,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            positions,
            self.q_heads,
            self.kv_heads,
            table,
            eps=self.eps,
            backend=self.backend,
            **cache,
        )

    def attended(self, qkv: Tensor, context: Context) -> Tensor:
        """qkv_proj's output -> what out_proj takes, [batch, length, q_heads head_dim]."""
        cache, length = context.cache, qkv.shape[1]
        if cache is None:
            q, k, v = self.project(qkv, context.positions, context.rope_table)
        else:
            i = self.layer_index
            buffers = {"k_cache": cache.k[i], "v_cache": cache.v[i], "slots": context.slots}
            q, _, _ = self.project(qkv, context.positions, context.rope_table, **buffers)
            k, v = cache.filled(i, length)
        if context.cu_seqlens is not None:
            q, k, v = in_one_row((q, k, v))
        out = ops.attention(
            q,
            k,
            v,
            key_mask=context.key_mask,
            offsets=context.offsets,
            cu_seqlens=context.cu_seqlens,
            backend=self.attention_backend,
        )
        return out.reshape(*qkv.shape[:2], self.q_heads * self.head_dim)

    def forward(
        self, x: Tensor, context: Context, make: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """make gives x again in the backward pass (see `recompute`)."""
        make = make if context.cache is None else None
        return self.out_proj(self.attended(recompute.apply(self.qkv_proj, x, make), context))


class FusedDecoderLayer(nn.Module):
    """h = x + attn(attn_norm(x)); h + ffn(ffn_norm(h)), the first addition fused with its norm.
    backend: of `ops.add_rms_norm`; linear_backend: of `ops.linear`, for few rows.
    """

    def __init__(
        self, original: nn.Module, backend: str | None, linear_backend: str | None
    ) -> None:
        super().__init__()
        adopt(self, original)
        self.backend, self.linear_backend = backend, linear_backend

    def feed_forward(self, delta: Tensor, x: Tensor, lean: bool = False) -> Tensor:
        # Under autocast a projection's output is narrower than the residual stream.
        normed, x = ops.add_rms_norm(
            delta.to(x.dtype), x, self.ffn_norm.weight, self.ffn_norm.eps, backend=self.backend
        )
        if lean:
            return x + self.ffn(_narrowed(normed), self._again(x, self.ffn_norm))
        return x + self.ffn(normed)

    def _again(self, x: Tensor, norm: nn.Module) -> Callable[[], Tensor]:
        """What gives norm(x), as the projection after it takes it, once more."""
        kept, weight, dtype = x.detach(), norm.weight.detach(), _projected(x)
        return lambda: ops.rms_norm(kept, weight, norm.eps, backend=self.backend).to(dtype)

    def _lean(self) -> bool:
        """Whether the modules are those that can make their inputs again: one may have been left as
        it was, and in training they must not be compiled, whose compiler decides that itself.
        """
        fused = isinstance(self.attn_norm, FusedRMSNorm) and isinstance(self.attn, FusedAttention)
        return fused and isinstance(self.ffn, FusedFeedForward)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if small_batch.applies(x, self.linear_backend) and self._lean():
            weights = small_batch.weights_of(self, x)
            if weights is not None:
                return small_batch.forward(self, x, context, weights)
        if not torch.is_grad_enabled() or context.checkpointed or not self._lean():
            return self.feed_forward(self.attn(self.attn_norm(x), context), x)
        normed = _narrowed(self.attn_norm(x))
        delta = self.attn(normed, context, self._again(x, self.attn_norm))
        return self.feed_forward(delta, x, lean=True)


class _ForeignAttention(FusedAttention):
    """Attention of a model that has its own RotaryEmbedding in every layer."""

    def __init__(self, original, index, q_heads, kv_heads, backend, attention_backend) -> None:
        super().__init__(original, index, q_heads, kv_heads, backend, attention_backend)
        rotary = original.pos_embedding
        self.rope_base, self.rope_length = rotary.freq_constant, rotary.max_seq_length
        # A plain attribute: float32 whatever the model is cast to, and in no state_dict.
        self.table = torch.empty(0, self.head_dim)

    def rotation(self, length: int, device: torch.device) -> Tensor:
        """The table for positions below `length`, on a device."""
        if self.table.device != device or self.table.shape[0] < length:
            with torch.inference_mode(False):
                self.table = rope_table(
                    max(length, self.rope_length), self.head_dim, self.rope_base
                ).to(device)
        return self.table

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q [batch, lq, q_heads, head_dim], k and v [batch, kv_heads, lk, head_dim]."""
        if mask is None and (causal or q.shape[1] == 1):
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            out = ops.attention(q, k, v, backend=self.attention_backend)
        else:
            # The owner's own mask, added or boolean, is kept as it is.
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)
        return self.out_proj(out.flatten(-2))


class FusedCoreNetAttention(_ForeignAttention):
    """CoreNet's: past_keys, past_values [batch, kv_heads, past, head_dim] in, longer ones out."""

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
        length = x.shape[1]
        past = past_keys.shape[2] if use_kv_cache and past_keys is not None else 0
        positions = torch.arange(past, past + length, device=x.device)
        q, k, v = self.project(self.qkv_proj(x), positions, self.rotation(past + length, x.device))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if use_kv_cache:
            if past:
                k, v = torch.cat((past_keys, k), dim=2), torch.cat((past_values, v), dim=2)
            past_keys, past_values = k, v
        return self.attend(q, k, v, None, is_causal), past_keys, past_values


class FusedCoreNetLayer(FusedDecoderLayer):
    def forward(self, x, past_keys=None, past_values=None, *args, **kwargs):
        delta, past_keys, past_values = self.attn(
            self.attn_norm(x), past_keys, past_values, *args, **kwargs
        )
        return self.feed_forward(delta, x), past_keys, past_values


class FusedHuggingFaceAttention(_ForeignAttention):
    """Apple's Hugging Face code: keys and values go through a transformers Cache object."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_value=None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, None, object]:
        length, device = hidden_states.shape[1], hidden_states.device
        past_key_value = getattr(self, "past_key_value", past_key_value)
        past = 0
        if past_key_value is not None:
            past = int(past_key_value.get_seq_length(self.layer_index))
        positions = cache_position
        if positions is None:
            positions = torch.arange(past, past + length, device=device)
        table = self.rotation(past + length, device)
        q, k, v = self.project(self.qkv_proj(hidden_states), positions, table)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_index, {"cache_position": cache_position})
        mask = attention_mask
        if mask is not None and cache_position is not None:
            mask = mask[:, :, cache_position, : k.shape[2]]
        return self.attend(q, k, v, mask, False), None, past_key_value


class FusedHuggingFaceLayer(FusedDecoderLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value=None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: Tensor | None = None,
        **kwargs,
    ) -> tuple:
        delta, weights, past_key_value = self.attn(
            hidden_states=self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
            **kwargs,
        )
        outputs = (self.feed_forward(delta, hidden_states),)
        if output_attentions:
            outputs += (weights,)
        return (*outputs, past_key_value) if use_cache else outputs
