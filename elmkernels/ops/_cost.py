"""Floating-point operations of the ops' matrix products: the one place that counts them.

The records of `testing` and, by the arguments of raw kernels, torch's FlopCounterMode read these.
"""

from collections.abc import Iterable

from torch import Tensor

from ..weights.formats import Weight
from ..weights.table import matrices_of


def of_linear(x: Tensor, weight: Weight, *rest: object) -> int:
    """The product of x [..., k] with a weight of n rows, in any form."""
    return 2 * x.numel() * weight.shape[0]


def of_attention(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> int:
    """Two products of the pairs that see each other, by q [batch, lq, q_heads, head_dim] and k
    [batch, lk, ...]; of documents their own pairs alone."""
    batch, lq, heads, head_dim = q.shape
    lk = k.shape[1]
    pairs = batch * (lq * (lk - lq) + lq * (lq + 1) // 2)  # causal
    if cu_seqlens is not None:
        pairs = sum(n * (n + 1) // 2 for n in cu_seqlens.diff().tolist())
    return 4 * heads * head_dim * pairs


def of_attention_bwd(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> int:
    """The backward makes five products of the forward's two, scores among them."""
    return of_attention(q, k, cu_seqlens) * 5 // 2


def attention_fwd(q, k, v, key_mask, offsets, cu_seqlens, scale) -> int:
    return of_attention(q, k, cu_seqlens)


def attention_bwd(dout, q, k, v, out, lse, key_mask, offsets, cu_seqlens, scale) -> int:
    return of_attention_bwd(q, k, cu_seqlens)


def of_losses(hidden: Tensor, weight: Tensor, products: int = 1) -> int:
    """As many products of all rows: one for the logits, one for each gradient."""
    return 2 * products * hidden.numel() * weight.shape[0]


def losses(hidden, weight, targets, dloss, ignore, z_loss, smoothing, dhidden, dweight, _) -> int:
    return of_losses(hidden, weight, 1 + dhidden + dweight)


def of_step(matrices: Iterable[tuple[int, int]], batch: int) -> int:
    """The products of one token of each sequence with matrices [n, k]."""
    return 2 * batch * sum(n * k for n, k in matrices)


def step_fwd(table: Tensor, tokens: Tensor, *rest: object) -> int:
    *layers, last = table.tolist()
    matrices = [m for row in layers for m in matrices_of(row)] + matrices_of(last)[1:]
    return of_step(matrices, tokens.numel())
