"""attention: softmax(scale q k^T) v, causal, grouped-query, over a cache of any length.

It is torch's own scaled_dot_product_attention, called so that no key or value is ever repeated in
memory and that the mask is implicit wherever it can be. Gradients are torch's.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import reference
from ..checks import DTYPES, fail, floating, like
from ..reference.attention import visible_keys

BACKENDS = ("sdpa", "reference")


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the shapes, dtypes and devices fit: all that a right call pays for."""
    if not (q.dim() == 4 and k.dim() == 4 and k.shape == v.shape and q.dtype in DTYPES):
        return False
    batch, lq, q_heads, head_dim = q.shape
    k_batch, lk, kv_heads, k_head_dim = k.shape
    return (
        k_batch == batch
        and k_head_dim == head_dim
        and lk >= lq
        and kv_heads > 0
        and q_heads % kv_heads == 0
        and k.dtype == q.dtype
        and v.dtype == q.dtype
        and k.device == q.device
        and v.device == q.device
    )


def _refuse(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Name what doesn't fit."""
    floating("q", q)
    like("k", k, "q", q)
    like("v", v, "q", q)
    if q.dim() != 4:
        fail("q", "[batch, length, q_heads, head_dim]", list(q.shape))
    batch, lq, q_heads, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        fail("k", f"[{batch}, length, kv_heads, {head_dim}]", list(k.shape))
    if v.shape != k.shape:
        fail("v", f"{list(k.shape)} like k", list(v.shape))
    if k.shape[1] < lq:
        fail("k", f"at least as long as q ({lq})", k.shape[1])
    fail("q", f"of a multiple of {k.shape[2]} heads (those of k)", q_heads)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    offsets: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal grouped-query attention; query i of lq sits at key index i + lk - lq.

    q: [batch, lq, q_heads, head_dim]; k, v: [batch, lk, kv_heads, head_dim], lk >= lq, any strides
    with a packed head_dim; key_mask: bool [batch, lk], False for padding; scale: head_dim^-0.5.
    offsets: int64 [batch], the key index of each row's first query instead of lk - lq.
    Returns [batch, lq, q_heads, head_dim]; a query that sees no key gives zeros.
    Raises TypeError or ValueError for a wrong argument. backend: "sdpa" or "reference".
    """
    if not all(isinstance(t, Tensor) for t in (q, k, v)) or not _fits(q, k, v):
        _refuse(q, k, v)
    if key_mask is not None and (key_mask.shape != k.shape[:2] or key_mask.dtype.is_floating_point):
        fail("key_mask", f"bool {list(k.shape[:2])}", f"{key_mask.dtype} {list(key_mask.shape)}")
    if offsets is not None and (offsets.shape != q.shape[:1] or offsets.dtype != torch.int64):
        fail("offsets", f"int64 [{q.shape[0]}]", f"{offsets.dtype} {list(offsets.shape)}")
    if backend is not None and backend not in BACKENDS:
        fail("backend", " or ".join(BACKENDS) + " for attention", repr(backend))
    key_mask = None if key_mask is None else key_mask.bool()
    if backend == "reference" or q.numel() == 0:
        return reference.attention(q, k, v, key_mask, scale, offsets)
    batch, lq, q_heads, head_dim = q.shape
    lk, kv_heads = k.shape[1:3]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if lq == 1:
        # The query heads of a group become the rows of one small matrix: each key is read once.
        grouped = q.view(batch, kv_heads, q_heads // kv_heads, head_dim)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if offsets is not None:
            mask = visible_keys(1, lk, key_mask, q.device, offsets)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(batch, 1, q_heads, head_dim)
    queries = q.transpose(1, 2)
    if key_mask is None and offsets is None and lq == lk:
        out = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        visible = visible_keys(lq, lk, key_mask, q.device, offsets)
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=scale, enable_gqa=True
        )
        if key_mask is not None:
            out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)
