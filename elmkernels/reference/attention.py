"""softmax(scale q k^T) v with a causal mask, each key/value head shared by a group of query heads.

Query i of lq sits at key index i + lk - lq: the last query sees every key. With offsets it sits at
offsets[b] + i in row b, for rows of different lengths. A query that sees no key (padding) gives
zeros.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def visible_keys(
    lq: int,
    lk: int,
    key_mask: Tensor | None,
    device: torch.device,
    offsets: Tensor | None = None,
) -> Tensor:
    """bool [1 or batch, 1, lq, lk]: which key each query may attend to."""
    if offsets is None:
        visible = torch.ones(lq, lk, dtype=torch.bool, device=device).tril(lk - lq)[None, None]
    else:
        at = offsets[:, None] + torch.arange(lq, device=device)
        visible = (torch.arange(lk, device=device) <= at[..., None])[:, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """q [batch, lq, q_heads, head_dim], k, v [batch, lk, kv_heads, head_dim] with lk >= lq,
    key_mask bool [batch, lk] (False = padding), scale default head_dim^-0.5, offsets int64 [batch]
    -> the shape of q.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
    lq, lk = q.shape[1], k.shape[2]
    if key_mask is None and offsets is None and lq in (1, lk):
        causal = True if lq > 1 else False  # a branch, so that a symbolic length gives a bool
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=causal, scale=scale)
    else:
        visible = visible_keys(lq, lk, key_mask, q.device, offsets)
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible, scale=scale)
        if key_mask is not None:
            out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)
