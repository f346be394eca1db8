"""The layers of the reference model, and what they share.

The protocol between them, which any replacement of a module keeps: `layer(x, context)` and
`attn(x, context)`, `ffn(x)` and `norm(x)`, where one `Context` is built by every forward pass and
shared by its layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference import attention, qk_norm_rope, rms_norm, swiglu
from ..weights.formats import Weight
from .cache import KVCache
from .compressed import product
from .config import OpenELMConfig
from .documents import in_one_row


class Context(NamedTuple):
    """What the layers of one forward pass over [batch, length] tokens share."""

    positions: Tensor  # int64 [batch, length], maybe of stride 0
    rope_table: Tensor  # float32 [rope_max_length, head_dim]
    key_mask: Tensor | None  # bool [batch, past + length], False = padding; None = all real
    cache: KVCache | None
    slots: Tensor | None  # int64 [batch, length]: where in the cache to write; None without one
    offsets: Tensor | None = None  # int64 [batch]: tokens before, where the cache's rows differ
    cu_seqlens: Tensor | None = None  # int64 [documents + 1] over the batch * length tokens
    checkpointed: bool = False  # the layers are run again in the backward pass


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Attention(nn.Module):
    def __init__(
        self, config: OpenELMConfig, layer_index: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.q_heads = config.num_query_heads[layer_index]
        self.kv_heads = config.num_kv_heads[layer_index]
        self.head_dim = config.head_dim
        self.eps = config.norm_eps
        width = (self.q_heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.model_dim, width, bias=False, dtype=dtype)
        normalize = config.normalize_qk_projections
        self.q_norm = RMSNorm(self.head_dim, self.eps, dtype=dtype) if normalize else None
        self.k_norm = RMSNorm(self.head_dim, self.eps, dtype=dtype) if normalize else None
        self.out_proj = nn.Linear(
            self.q_heads * self.head_dim, config.model_dim, bias=False, dtype=dtype
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = qk_norm_rope(
            self.qkv_proj(x),
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            context.positions,
            self.q_heads,
            self.kv_heads,
            context.rope_table,
            self.eps,
        )
        if context.cache is not None:
            k, v = context.cache.append(self.layer_index, k, v)
        if context.cu_seqlens is not None:
            q, k, v = in_one_row((q, k, v))
        sight = {"offsets": context.offsets, "cu_seqlens": context.cu_seqlens}
        out = attention(q, k, v, context.key_mask, **sight)
        return self.out_proj(out.reshape(*x.shape[:2], self.q_heads * self.head_dim))

    def extra_repr(self) -> str:
        return f"q_heads={self.q_heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


class FeedForward(nn.Module):
    def __init__(
        self, config: OpenELMConfig, layer_index: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        width = config.ffn_dims[layer_index]
        self.with_glu = config.ffn_with_glu
        width_1 = 2 * width if self.with_glu else width
        self.proj_1 = nn.Linear(config.model_dim, width_1, bias=False, dtype=dtype)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_1(x)
        return self.proj_2(swiglu(x) if self.with_glu else F.silu(x))


class DecoderLayer(nn.Module):
    def __init__(
        self, config: OpenELMConfig, layer_index: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.attn = Attention(config, layer_index, dtype=dtype)
        self.ffn = FeedForward(config, layer_index, dtype=dtype)
        self.attn_norm = RMSNorm(config.model_dim, config.norm_eps, dtype=dtype)
        self.ffn_norm = RMSNorm(config.model_dim, config.norm_eps, dtype=dtype)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(self.attn_norm(x), context)
        return x + self.ffn(self.ffn_norm(x))


class TiedHead(nn.Module):
    """The output projection by another module's weight: no parameters of its own."""

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return product(x, weight)


class LogitsHead(nn.Module):
    """What the last layer gives, [..., model_dim] -> logits: the norm, then the projection."""

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.project(model.norm(x))
