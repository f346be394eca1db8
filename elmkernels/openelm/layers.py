"""The layers of the reference model, and what they share.

The protocol between them, which any replacement of a module keeps: `layer(x, context)` and
`attn(x, context)`, `ffn(x)` and `norm(x)`, where one `Context` is built by every forward pass and
shared by its layers.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import fail, values_of
from ..reference import attention, qk_norm_rope, rms_norm, swiglu
from ..surgery import known, knows, plain
from ..weights.formats import Weight
from .cache import KVCache
from .compressed import product
from .config import OpenELMConfig
from .documents import check_documents, in_one_row, positions_of


class Rotation:
    """Holds the rotary table, float32 whatever the model is: what casts the tensors among a
    module's arguments (FSDP2's mixed precision does) must not find it there.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table


class Context(NamedTuple):
    """What the layers of one forward pass over [batch, length] tokens share."""

    positions: Tensor  # int64 [batch, length], maybe of stride 0
    rotation: Rotation  # of float32 [positions, head_dim], of all that are asked for
    key_mask: Tensor | None  # bool [batch, past + length], False = padding; None = all real
    cache: KVCache | None
    slots: Tensor | None  # int64 [batch, length]: where in the cache to write; None without one
    offsets: Tensor | None = None  # int64 [batch]: tokens before, where the cache's rows differ
    cu_seqlens: Tensor | None = None  # int64 [documents + 1] over the batch * length tokens
    # (module, q, k, v) -> what attention gives: in its place, the cache's too (another project's)
    attend: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None
    # In the last layer: x [batch, length, ...] -> its positions that anybody asks for. A layer may
    # give those alone; attention still needs the keys and values of all.
    kept: Callable[[Tensor], Tensor] | None = None

    @property
    def rope_table(self) -> Tensor:
        """float32 [positions, head_dim]"""
        return self.rotation.table


@known
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def norms_called(
    q_norm: nn.Module, k_norm: nn.Module, qkv: Tensor, q_heads: int, kv_heads: int
) -> Tensor:
    """qkv [batch, length, ...] with its queries and keys through modules that normalize heads."""
    heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1))
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=-2)
    return torch.cat((q_norm(q).to(v.dtype), k_norm(k).to(v.dtype), v), dim=-2).flatten(-2)


@knows("attended", "normalized")
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
        return self.out_proj(self.attended(self.qkv_proj(x), context))

    def attended(self, qkv: Tensor, context: Context) -> Tensor:
        """qkv_proj's output -> what out_proj takes, [batch, length, q_heads head_dim]."""
        qkv, q_weight, k_weight = self.normalized(qkv)
        q, k, v = qk_norm_rope(
            qkv, q_weight, k_weight, context.positions, self.q_heads, self.kv_heads,
            context.rope_table, self.eps,
        )  # fmt: skip
        if context.cache is not None:
            k, v = context.cache.append(self.layer_index, k, v)
        if context.cu_seqlens is not None:
            q, k, v = in_one_row((q, k, v))
        if context.attend is None:
            offsets, documents = context.offsets, context.cu_seqlens
            out = attention(q, k, v, context.key_mask, offsets=offsets, cu_seqlens=documents)
        else:
            out = context.attend(self, q, k, v)
        return out.reshape(*qkv.shape[:2], self.q_heads * self.head_dim)

    def normalized(self, qkv: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `qk_norm_rope` takes first: qkv and the weights of its norms, or None for them if
        the norms were called here, because something hangs on one.
        """
        if self.q_norm is None or self.k_norm is None:
            return qkv, None, None
        if all(isinstance(n, RMSNorm) and plain(n) for n in (self.q_norm, self.k_norm)):
            return qkv, self.q_norm.weight, self.k_norm.weight
        return norms_called(self.q_norm, self.k_norm, qkv, self.q_heads, self.kv_heads), None, None

    def extra_repr(self) -> str:
        return f"q_heads={self.q_heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


@known
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


@known
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


@known
class TiedHead(nn.Module):
    """The output projection by another module's weight: no parameters of its own."""

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        return product(x, weight)


@known
class LogitsHead(nn.Module):
    """What the last layer gives, [..., model_dim] -> logits: the norm, then the projection."""

    def forward(self, model: Any, x: Tensor) -> Tensor:
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
    cache.take_dtype(dtype)
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
    rotation = Rotation(rope_table)
    past = 0 if cache is None else cache.length
    if cu_seqlens is not None:
        if cache is not None or attention_mask is not None:
            raise ValueError("cu_seqlens must be given without cache and attention_mask")
        check_documents(cu_seqlens, input_ids)
        positions = positions_of(cu_seqlens, batch * length).view(batch, length)
        return Context(positions, rotation, None, None, None, None, cu_seqlens)
    if cache is not None and cache.ragged:
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask must be None for a cache whose rows differ, got {cache.rows}"
            )
        offsets = cache.lengths.to(input_ids.device)
        new = offsets[:, None] + torch.arange(length, device=input_ids.device)
        return Context(new, rotation, None, cache, new, offsets)
    new = torch.arange(past, past + length, device=input_ids.device).expand(batch, -1)
    slots = None if cache is None else new
    if attention_mask is None:
        return Context(new, rotation, None, cache, slots)
    if attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask must be {[batch, past + length]} (past + new tokens), "
            f"got {list(attention_mask.shape)}"
        )
    key_mask = attention_mask.bool()
    positions = (key_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    return Context(positions, rotation, key_mask, cache, slots)


def of_kept(
    context: Context, layer: nn.Module, length: int, last: int, counts: list[int] | None
) -> Context:
    """The context of the last layer: if few of the positions are asked for, it may leave out what
    it adds to the others. Who hangs on the layer sees all of them.
    """
    if not 0 < last < length or not plain(layer):
        return context
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return context
    return context._replace(kept=lambda x: kept(x, last, counts))


def kept(x: Tensor, last: int, counts: list[int] | None) -> Tensor:
    """The last positions of x [batch, length, ...], of the first counts[b] in row b; 0 = all."""
    if counts is None or not last:
        return x[:, -last:]
    at = [[max(count - last + i, 0) for i in range(last)] for count in counts]
    index = torch.tensor(at, device=x.device)[..., None]
    return x.gather(1, index.expand(-1, -1, x.shape[2]))


def recomputed_layers(chosen: bool | Collection[int], count: int) -> Collection[int]:
    """The layers of `count` that the backward pass computes again (`gradient_checkpointing`)."""
    if isinstance(chosen, bool):
        return range(count) if chosen else ()
    if not all(0 <= i < count for i in chosen):
        raise ValueError(
            f"gradient_checkpointing must be a bool or layers in [0, {count}), got {chosen}"
        )
    return chosen
