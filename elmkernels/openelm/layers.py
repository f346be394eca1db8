"""The layers of the reference model, and what they share.

The protocol between them, which any replacement of a module keeps: `layer(x, context)` and
`attn(x, context)`, `ffn(x)` and `norm(x)`, where one `Context` is built by every forward pass and
shared by its layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import fail, values_of
from ..reference import attention, qk_norm_rope, rms_norm, swiglu
from ..weights.formats import Weight
from .cache import KVCache
from .compressed import product
from .config import OpenELMConfig
from .documents import check_documents, in_one_row, positions_of


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


def check_inputs(config: OpenELMConfig, input_ids: Tensor, cache: KVCache | None) -> None:
    """Raise TypeError or ValueError unless a model has the tokens, and positions for them after
    those that the cache holds.
    """
    if not isinstance(input_ids, Tensor):
        fail(
            "input_ids",
            "a tensor [batch, length] of int64 or int32, as torch.tensor([[1, 2]]) is",
            type(input_ids).__name__,
            TypeError,
        )
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "input_ids must be int64 or int32 [batch, length], "
            f"got {input_ids.dtype} {list(input_ids.shape)}"
        )
    batch, length = input_ids.shape
    past = 0 if cache is None else cache.length
    _check_ids(config, input_ids)
    if past + length > config.rope_max_length:
        raise ValueError(
            f"the rotary table has {config.rope_max_length} positions (rope_max_length), "
            f"got {past} past + {length} new tokens"
        )


def _check_ids(config: OpenELMConfig, input_ids: Tensor) -> None:
    # On a GPU the check would wait for the device; there the embedding itself fails.
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = (int(i) for i in torch.aminmax(values_of(input_ids)))
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"input_ids must lie in [0, {config.vocab_size}), got {low} to {high}")


def check_cache(
    config: OpenELMConfig, dtype: torch.dtype, cache: KVCache, input_ids: Tensor
) -> None:
    """Raise ValueError unless a model whose activations have the dtype can write tokens there."""
    batch, length = input_ids.shape
    for name, expected, got in (
        ("batch", batch, cache.batch),
        ("dtype", dtype, cache.dtype),
        ("device", input_ids.device, cache.device),
        ("key/value heads of each layer", list(config.num_kv_heads),
         list(cache.kv_heads)),
        ("head_dim", config.head_dim, cache.head_dim),
    ):  # fmt: skip
        if got != expected:
            raise ValueError(f"cache: {name} must be {expected}, got {got}")
    cache.check_room(length)


def check_counts(
    counts: Sequence[int] | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache | None,
) -> list[int] | None:
    """counts as a list; None where every token counts."""
    if counts is None:
        return None
    if cache is None or attention_mask is not None:
        raise ValueError("counts must be given with a cache and without attention_mask")
    counts = [int(count) for count in counts]
    batch, length = input_ids.shape
    if len(counts) != batch or not all(0 <= count <= length for count in counts):
        raise ValueError(f"counts must be {batch} numbers in [0, {length}], got {counts}")
    return None if min(counts) == length else counts


def context_of(
    rope_table: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    cu_seqlens: Tensor | None,
) -> Context:
    """The places of checked tokens: their positions, where they are written, what they may see."""
    batch, length = input_ids.shape
    past = 0 if cache is None else cache.length
    if cu_seqlens is not None:
        if cache is not None or attention_mask is not None:
            raise ValueError("cu_seqlens must be given without cache and attention_mask")
        check_documents(cu_seqlens, input_ids)
        positions = positions_of(cu_seqlens, batch * length).view(batch, length)
        return Context(positions, rope_table, None, None, None, None, cu_seqlens)
    if cache is not None and cache.ragged:
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask must be None for a cache whose rows differ, got {cache.rows}"
            )
        offsets = cache.lengths.to(input_ids.device)
        new = offsets[:, None] + torch.arange(length, device=input_ids.device)
        return Context(new, rope_table, None, cache, new, offsets)
    new = torch.arange(past, past + length, device=input_ids.device).expand(batch, -1)
    slots = None if cache is None else new
    if attention_mask is None:
        return Context(new, rope_table, None, cache, slots)
    if attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask must be {[batch, past + length]} (past + new tokens), "
            f"got {list(attention_mask.shape)}"
        )
    key_mask = attention_mask.bool()
    positions = (key_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    return Context(positions, rope_table, key_mask, cache, slots)


def kept(x: Tensor, last: int, counts: list[int] | None) -> Tensor:
    """The last positions of x [batch, length, ...], of the first counts[b] in row b; 0 = all."""
    if counts is None or not last:
        return x[:, -last:]
    at = [[max(count - last + i, 0) for i in range(last)] for count in counts]
    index = torch.tensor(at, device=x.device)[..., None]
    return x.gather(1, index.expand(-1, -1, x.shape[2]))
