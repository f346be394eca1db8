"""Checks of weights in any form, and of whole decoders."""

import torch
from torch import Tensor

from ..checks import fail, floating, positive, tensor
from ..checks import weight as check_norm
from .formats import Layer, Stack, Weight, check_part, form_of


def check_weight(name: str, weight: Weight) -> None:
    """The tensors of a weight fit each other."""
    form_of(weight).check(name)


def _projection(name: str, weight: Weight, n: int | None, k: int | None, norm: Tensor) -> None:
    """A projection of one n and k, each of which None leaves open."""
    check_weight(name, weight)
    expected = [b if a is None else a for a, b in zip((n, k), weight.shape, strict=True)]
    if list(weight.shape) != expected:
        fail(name, expected, list(weight.shape))
    if not form_of(weight).takes(norm.dtype):
        fail(name, f"{norm.dtype} like norm", weight.dtype, TypeError)
    if weight.device != norm.device:
        fail(name, f"on {norm.device} like norm", weight.device)
    if isinstance(weight, Tensor) and weight.stride(-1) != 1:
        fail(name, "of contiguous rows", f"strides {weight.stride()}")


def _norm(name: str, x: Tensor, n: int, norm: Tensor) -> None:
    check_norm(name, x, n, "norm", norm)
    if x.dtype != norm.dtype:
        fail(name, f"{norm.dtype} like norm", x.dtype, TypeError)
    if not x.is_contiguous():
        fail(name, "contiguous", f"strides {x.stride()}")


def _check_layer(name: str, layer: Layer, stack: Stack) -> None:
    d, dim, like = stack.head_dim, stack.model_dim, stack.norm
    q_heads, kv_heads = layer.q_heads, layer.kv_heads
    positive(f"{name}.kv_heads", kv_heads)
    positive(f"{name}.q_heads", q_heads)
    if q_heads % kv_heads:
        fail(f"{name}.q_heads", f"a multiple of kv_heads {kv_heads}", q_heads)
    _norm(f"{name}.attn_norm", layer.attn_norm, dim, like)
    _norm(f"{name}.ffn_norm", layer.ffn_norm, dim, like)
    for which, x in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
        if x is not None:
            _norm(f"{name}.{which}", x, d, like)
    _projection(f"{name}.proj_2", layer.proj_2, dim, None, like)
    ffn = layer.proj_2.shape[1]
    _projection(f"{name}.qkv_proj", layer.qkv_proj, (q_heads + 2 * kv_heads) * d, dim, like)
    _projection(f"{name}.out_proj", layer.out_proj, dim, q_heads * d, like)
    _projection(f"{name}.proj_1", layer.proj_1, (2 if stack.gated else 1) * ffn, dim, like)


def check_stack(stack: Stack) -> None:
    """The weights of a decoder fit its sizes and each other, in one dtype and on one device."""
    floating("stack.norm", stack.norm)
    if stack.norm.dim() != 1 or not stack.norm.is_contiguous():
        fail("stack.norm", "[model_dim], contiguous", list(stack.norm.shape))
    if stack.head_dim < 2 or stack.head_dim % 2:
        fail("stack.head_dim", "even and positive", stack.head_dim)
    dim, table = stack.model_dim, stack.rope_table
    tensor("stack.rope_table", table)
    length = table.shape[0] if table.dim() else 0
    check_part(
        "stack.rope_table", table, torch.float32, (length, stack.head_dim), stack.norm.device
    )
    for name, weight in (("embedding", stack.embedding), ("head", stack.head)):
        _projection(f"stack.{name}", weight, None, dim, stack.norm)
    for i, layer in enumerate(stack.layers):
        _check_layer(f"stack.layers[{i}]", layer, stack)
