"""What qk_norm_rope asks of its arguments, and of those of a cache."""

import torch
from torch import Tensor

from ..checks import broadcastable, fail, floating, integers, positive, tensor
from ..checks import shape as check_shape
from ..checks import weight as check_weight
from ..derivatives import refuse, unusual


def wants_gradient(qkv, q_weight, k_weight) -> bool:
    return torch.is_grad_enabled() and (
        qkv.requires_grad
        or (q_weight is not None and (q_weight.requires_grad or k_weight.requires_grad))
    )


def check_heads(qkv, q_weight, k_weight, positions, q_heads, kv_heads, rope_table) -> None:
    floating("qkv", qkv)
    positive("q_heads", q_heads)
    positive("kv_heads", kv_heads)
    tensor("rope_table", rope_table)
    if rope_table.dim() != 2 or rope_table.shape[1] % 2 or rope_table.dtype != torch.float32:
        fail("rope_table", "float32 [length, even head_dim]",
             f"{rope_table.dtype} {list(rope_table.shape)}")  # fmt: skip
    head_dim = rope_table.shape[1]
    width = (q_heads + 2 * kv_heads) * head_dim
    if qkv.dim() not in (2, 3) or qkv.shape[-1] != width:
        expected = f"[batch, length, {width}] ({q_heads} + 2 x {kv_heads} heads of {head_dim})"
        fail("qkv", expected, list(qkv.shape))
    if (q_weight is None) != (k_weight is None):
        fail("k_weight", "given exactly when q_weight is", "only one of them")
    if q_weight is not None:
        check_weight("q_weight", q_weight, head_dim, "qkv", qkv)
        check_weight("k_weight", k_weight, head_dim, "qkv", qkv)
        if q_weight.dtype != k_weight.dtype:
            fail("k_weight", f"{q_weight.dtype} like q_weight", k_weight.dtype, TypeError)
    integers("positions", positions, qkv.device)
    broadcastable("positions", positions, qkv.shape[:-1])
    if rope_table.device != qkv.device:
        fail("rope_table", f"on {qkv.device} like qkv", rope_table.device)


def checked_cache(
    qkv, q_weight, k_weight, kv_heads, rope_table,
    k_cache: Tensor | None, v_cache: Tensor | None, slots: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if qkv.dim() == 2:
        fail("qkv", "[batch, length, width] when a cache is written", list(qkv.shape))
    head_dim = rope_table.shape[1]
    if k_cache is None or v_cache is None or slots is None:
        name = "v_cache" if k_cache is not None and slots is not None else "k_cache"
        fail("k_cache, v_cache and slots", "given together", f"{name} or slots as None")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        tensor(name, cache)
        if cache.dtype != qkv.dtype or cache.device != qkv.device:
            expected = f"{qkv.dtype} on {qkv.device} like qkv"
            fail(name, expected, f"{cache.dtype} on {cache.device}", TypeError)
        if cache.dim() != 4 or cache.shape[0] != qkv.shape[0] or cache.stride(3) != 1:
            fail(name, f"[{qkv.shape[0]}, max_length, {kv_heads}, {head_dim}]", list(cache.shape))
        check_shape(name, cache, (qkv.shape[0], cache.shape[1], kv_heads, head_dim))
    if v_cache.shape != k_cache.shape:
        fail("v_cache", f"{list(k_cache.shape)} like k_cache", list(v_cache.shape))
    integers("slots", slots, qkv.device)
    broadcastable("slots", slots, qkv.shape[:-1])
    if wants_gradient(qkv, q_weight, k_weight):
        raise RuntimeError(
            "qkv and the weights must not require a gradient when a cache is written: "
            "call under torch.no_grad()"
        )
    if unusual():
        refuse("qk_norm_rope", "derivative or vmap if a cache is written", "call it without one")
    return k_cache, v_cache, slots
