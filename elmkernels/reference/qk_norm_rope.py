"""Split a fused projection into q, k, v by its head counts; RMS-normalize and rotate q and k.

The projection's columns are q | k | v, head after head. q and k are normalized over head_dim
(one weight shared by the heads; optional), then rotated by half-split RoPE in float32:
(a, b) -> (a cos - b sin, b cos + a sin) for the two halves a, b of a head. v is a view.
"""

import torch
from torch import Tensor

from .rms_norm import normalize


def rope_table(
    length: int, head_dim: int, base: float = 10000.0, device: torch.device | str | None = None
) -> Tensor:
    """The cosines and sines of rotary positions, which `qk_norm_rope` reads.

    Args:
        length: how many positions, from 0 on.
        head_dim: an even number.
        base: f_i = base^(-2 i / head_dim) are the frequencies, in radians a position.
        device: where the table is made; None for torch's default.

    Returns:
        float32 [length, head_dim]; row p is cos(p f_i), then sin(p f_i).

    Example:
        >>> elmkernels.rope_table(2048, 64).shape
        torch.Size([2048, 64])
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., heads, head_dim], cos and sin [..., 1, head_dim / 2]: rotated in the wider dtype."""
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    q_heads: int,
    kv_heads: int,
    rope_table: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [..., (q_heads + 2 kv_heads) head_dim], positions broadcastable to qkv.shape[:-1],
    rope_table [table_length, head_dim] -> q [..., q_heads, head_dim] and k, v with kv_heads.
    """
    heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1))
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=-2)
    if q_weight is not None:
        q = normalize(q, eps) * q_weight
    if k_weight is not None:
        k = normalize(k, eps) * k_weight
    cos, sin = rope_table[positions].unsqueeze(-2).chunk(2, dim=-1)
    return rotate(q, cos, sin).to(qkv.dtype), rotate(k, cos, sin).to(qkv.dtype), v
