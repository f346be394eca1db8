"""attention by torch's own scaled_dot_product_attention, gradients included.

No key or value is repeated in memory, and the mask is implicit wherever it can be. Documents are
attended to one by one, which needs their lengths on the host: a GPU is waited for, and tracing
breaks there.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..reference.attention import visible_keys, without_unseen
from ._attention_choice import refuse_forward_mode


def by_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The op on arguments that it has checked, with at least one query."""
    refuse_forward_mode(q, k, v)
    if cu_seqlens is not None:
        return _documents(q, k, v, cu_seqlens.diff().tolist(), scale)
    batch, lq, q_heads, head_dim = q.shape
    lk, kv_heads = k.shape[1:3]
    if offsets is not None:
        k, v = without_unseen(k, v, lq, offsets)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    visible = None
    if key_mask is not None or offsets is not None or lq not in (1, lk):
        visible = visible_keys(lq, lk, key_mask, offsets, q.device)
    if lq == 1:
        # The query heads of a group become the rows of one small matrix: each key is read once.
        queries = q.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)
    else:
        queries, causal = q.transpose(1, 2), visible is None
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=True
        )
    if key_mask is not None and visible is not None:
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.reshape(q.shape) if lq == 1 else out.transpose(1, 2)


def _documents(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """One document after the other. split: its gradient is one concatenation, where a slice's is
    the whole tensor again for every document."""
    documents = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
    found = [
        by_sdpa(queries, keys, values, None, None, None, scale)
        for queries, keys, values in documents
        if queries.shape[1]
    ]
    return torch.cat(found, dim=1)
