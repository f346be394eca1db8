"""softmax(scale q k^T) v with a causal mask, each key/value head shared by a group of query heads.

Query i of row b sees the keys 0..offsets[b] + i; without offsets the last query sees every key. Of
varlen documents it sees its own alone. A query that sees no key (padding) gives zeros.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .common import document_of


def visible_keys(lq: int, lk: int, key_mask, offsets, device: torch.device) -> Tensor:
    """bool [1 or batch, 1, lq, lk]: which key each query may attend to."""
    if offsets is None:
        visible = torch.ones(lq, lk, dtype=torch.bool, device=device).tril(lk - lq)[None, None]
    else:
        last = offsets[:, None] + torch.arange(lq, device=device)
        visible = (torch.arange(lk, device=device) <= last[..., None])[:, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def without_unseen(k: Tensor, v: Tensor, lq: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with zeros beyond the end of each row: what lies there may be NaN, which a weight of
    0 would keep."""
    beyond = (torch.arange(k.shape[1], device=k.device) >= offsets[:, None] + lq)[..., None, None]
    return k.masked_fill(beyond, 0.0), v.masked_fill(beyond, 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """q [batch, lq, q_heads, head_dim], k, v [batch, lk, kv_heads, head_dim] with lk >= lq,
    key_mask bool [batch, lk] (False = padding), scale default head_dim^-0.5, offsets int64 [batch]
    in [0, lk - lq], default lk - lq, cu_seqlens int64 [documents + 1], rising from 0 to lk, for
    batch 1, lq == lk and neither key_mask nor offsets -> the shape of q.
    """
    group, lq, lk = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    if offsets is not None:
        k, v = without_unseen(k, v, lq, offsets)
    k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
    if key_mask is None and offsets is None and cu_seqlens is None and lq in (1, lk):
        causal = True if lq > 1 else False  # a branch, so that a symbolic length gives a bool
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=causal, scale=scale)
    else:
        visible = visible_keys(lq, lk, key_mask, offsets, q.device)
        if cu_seqlens is not None:
            document = document_of(cu_seqlens, lk)
            visible = visible & (document[:, None] == document)
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible, scale=scale)
        if key_mask is not None:
            out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)
