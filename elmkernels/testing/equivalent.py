"""The reference, evaluated in other ways that are as right: what is summed comes in another order.

An op's function here takes its arguments in a random order of everything that its formula sums
(columns, rows, keys, heads of a group, vocabulary), asks the reference, and puts the results back
in place. In exact arithmetic that changes nothing, forward or backward; in a working dtype it is
another sample of the reference's error. `parity` takes the largest of several as its yardstick.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import reference
from ..formats import Arena, Stack, Weight
from ..reference.attention import visible_keys, without_unseen
from ..reference.common import document_of


class Orders:
    """Random orders, repeatable from their seed: `orders(n)` is one of n things."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device)

    def pairs(self, n: int) -> Tensor:
        """An order of n things that keeps those n / 2 apart in pairs: gate and up, the two
        coordinates that RoPE rotates."""
        half = self(n // 2)
        return torch.cat((half, half + n // 2))

    def heads(self, kv_heads: int, group: int) -> Tensor:
        """An order of the query heads within the group that shares a key head."""
        return torch.cat([group * i + self(group) for i in range(kv_heads)])


def take(x: Tensor, *orders: Tensor | None) -> Tensor:
    """x with its dimensions, from the first on, in these orders."""
    for dim, order in enumerate(orders):
        if order is not None:
            x = x.index_select(dim, order)
    return x


def put_back(x: Tensor, *orders: Tensor | None) -> Tensor:
    """What `take` took apart, in its place again."""
    return take(x, *(order if order is None else order.argsort() for order in orders))


def _rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rms_norm(orders: Orders, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Columns, which the mean sums; rows, which the weight's gradient sums."""
    rows, columns = orders(math.prod(x.shape[:-1])), orders(x.shape[-1])
    y = reference.rms_norm(take(_rows(x), rows, columns), take(weight, columns), eps)
    return put_back(y, rows, columns).view(x.shape)


def add_rms_norm(
    orders: Orders, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As `rms_norm`."""
    rows, columns = orders(math.prod(x.shape[:-1])), orders(x.shape[-1])
    both = (take(_rows(t), rows, columns) for t in (x, residual))
    found = reference.add_rms_norm(*both, take(weight, columns), eps)
    normed, total = (put_back(t, rows, columns).view(x.shape) for t in found)
    return normed, total


def qk_norm_rope(
    orders: Orders,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    q_heads: int,
    kv_heads: int,
    rope_table: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a head's columns, which the norm sums; tokens and heads, which the weights'
    gradients sum."""
    shape, heads = qkv.shape[:-1], q_heads + 2 * kv_heads
    width = qkv.shape[-1] // heads
    tokens, columns = orders(math.prod(shape)), orders.pairs(width)
    of_q, of_k, of_v = orders(q_heads), orders(kv_heads), orders(kv_heads)
    of_all = torch.cat((of_q, q_heads + of_k, q_heads + kv_heads + of_v))
    found = reference.qk_norm_rope(
        take(qkv.reshape(len(tokens), heads, width), tokens, of_all, columns).flatten(1),
        None if q_weight is None else take(q_weight, columns),
        None if k_weight is None else take(k_weight, columns),
        take(positions.expand(shape).reshape(-1), tokens),
        q_heads,
        kv_heads,
        take(rope_table, None, columns),
        eps,
    )
    q, k, v = (
        put_back(t, tokens, order, columns).view(*shape, *t.shape[1:])
        for t, order in zip(found, (of_q, of_k, of_v), strict=True)
    )
    return q, k, v


def swiglu(orders: Orders, gate_up: Tensor) -> Tensor:
    """Nothing is summed, but torch has two exps: one of many numbers, one of a single one, which
    it takes where they don't lie side by side."""
    return reference.swiglu(torch.stack((gate_up, gate_up), dim=-1)[..., 0])


def attention(
    orders: Orders,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Columns of q and k, which a score sums, and of v, which the backward does; keys, with what
    each query sees of them; queries and the heads of a group, which the gradients of k and v sum.
    """
    group, lq, lk = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    if offsets is not None:
        k, v = without_unseen(k, v, lq, offsets)
    visible = visible_keys(lq, lk, key_mask, offsets, q.device)
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, lk)
        visible = visible & (document[:, None] == document)
    queries, keys, heads = orders(lq), orders(lk), orders.heads(k.shape[2], group)
    columns, of_v = orders(q.shape[3]), orders(q.shape[3])
    visible = take(visible, None, None, queries, keys)
    real = visible.any(-1, keepdim=True)
    # Every head of a group sees the same keys: only the queries have to come in the heads' order.
    q = take(q, None, queries, heads, columns).transpose(1, 2)
    k = take(k, None, keys, None, columns).repeat_interleave(group, dim=2).transpose(1, 2)
    v = take(v, None, keys, None, of_v).repeat_interleave(group, dim=2).transpose(1, 2)
    if q.dtype.itemsize >= 4 and q.numel():
        again = orders(q.shape[3])
        out = _scored_twice(
            q,
            k,
            v,
            take(q, None, None, None, again),
            take(k, None, None, None, again),
            visible | ~real,
            scale,
        )
    else:
        mask = None if bool(visible.all()) else visible
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if key_mask is not None:
        out = out.masked_fill(~real, 0.0)
    return put_back(out.transpose(1, 2), None, queries, heads, of_v)


def _scored_twice(
    q: Tensor, k: Tensor, v: Tensor, q_again: Tensor, k_again: Tensor, visible: Tensor,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention whose backward makes the weights again, from the forward's log-sums and scores
    summed in another order: as right as from the same scores, and what a kernel does whose
    forward and backward have other blocks. Where scores are large it is far from the same: the
    weights no longer add up to 1. On some processors torch's own backward does it too."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    first, second = (
        (a @ b.mT * scale).masked_fill(~visible, -math.inf) for a, b in ((q, k), (q_again, k_again))
    )
    sums = _with_gradient(first.logsumexp(-1, keepdim=True), second.logsumexp(-1, keepdim=True))
    return _with_gradient(first.softmax(-1) @ v, (second - sums).exp() @ v)


def _with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """value, whose gradient is that of another one."""
    return value.detach() + (of - of.detach())


def linear(
    orders: Orders, x: Tensor, weight: Weight, norm: Tensor | None = None, eps: float = 1e-6,
    swiglu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Columns of x and the weight, which the product and the norm sum; rows of x, which the
    weight's gradient sums, and of the weight, which that of x does."""
    w = reference.dense(weight, x.dtype)
    rows, columns = orders(math.prod(x.shape[:-1])), orders(x.shape[-1])
    outputs = orders.pairs(len(w)) if swiglu else orders(len(w))
    n = len(w) // 2 if swiglu else len(w)
    y = reference.linear(
        take(_rows(x), rows, columns),
        take(w, outputs, columns),
        None if norm is None else take(norm, columns),
        eps,
        swiglu,
        None if residual is None else take(_rows(residual), rows, outputs[:n]),
    )
    return put_back(y, rows, outputs[:n]).view(*x.shape[:-1], n)


def linear_cross_entropy(
    orders: Orders, hidden: Tensor, weight: Tensor, targets: Tensor, *,
    ignore_index: int = -100, reduction: str = "mean", **options,
) -> Tensor:  # fmt: skip
    """Columns, which a logit sums; the vocabulary, which the softmax does; rows, which the loss
    and the weight's gradient do."""
    rows, columns = orders(targets.numel()), orders(hidden.shape[-1])
    vocabulary, nothing = orders(len(weight)), -100
    drawn = take(targets.reshape(-1), rows)
    real = drawn != ignore_index
    moved = vocabulary.argsort()[drawn.where(real, 0)].where(real, nothing)
    losses = reference.linear_cross_entropy(
        take(_rows(hidden), rows, columns),
        take(weight, vocabulary, columns),
        moved,
        ignore_index=nothing,
        reduction=reduction,
        **options,
    )
    return put_back(losses, rows).view(targets.shape) if reduction == "none" else losses


def decode_step(
    orders: Orders, stack: Stack, tokens: Tensor, positions: Tensor, arena: Arena
) -> Tensor:
    """The columns of the hidden numbers, of a head (pairs of queries' and keys', any of values')
    and of the feed-forward network, and the heads of a group."""
    hidden, columns, of_v = (
        orders(stack.model_dim), orders.pairs(stack.head_dim), orders(stack.head_dim)
    )  # fmt: skip

    def matrix(w: Weight, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
        return take(reference.dense(w, arena.data.dtype), outputs, inputs)

    def vector(w: Tensor | None, order: Tensor) -> Tensor | None:
        return None if w is None else take(w, order)

    layers = []
    for layer in stack.layers:
        q_heads, kv_heads = layer.q_heads, layer.kv_heads
        heads = orders.heads(kv_heads, q_heads // kv_heads)
        ffn = orders(layer.proj_2.shape[1])
        of_k = q_heads + torch.arange(kv_heads, device=heads.device)
        parts = ((heads, columns), (of_k, columns), (of_k + kv_heads, of_v))
        qkv = torch.cat([(h[:, None] * stack.head_dim + c).flatten() for h, c in parts])
        gated = torch.cat((ffn, ffn + len(ffn))) if stack.gated else ffn
        out = (heads[:, None] * stack.head_dim + of_v).flatten()
        layers.append(
            layer._replace(
                attn_norm=take(layer.attn_norm, hidden),
                qkv_proj=matrix(layer.qkv_proj, qkv, hidden),
                q_norm=vector(layer.q_norm, columns),
                k_norm=vector(layer.k_norm, columns),
                out_proj=matrix(layer.out_proj, hidden, out),
                ffn_norm=take(layer.ffn_norm, hidden),
                proj_1=matrix(layer.proj_1, gated, hidden),
                proj_2=matrix(layer.proj_2, hidden, ffn),
            )
        )
    changed = {
        "embedding": matrix(stack.embedding, None, hidden),
        "layers": tuple(layers),
        "norm": take(stack.norm, hidden),
        "head": matrix(stack.head, None, hidden),
        "rope_table": take(stack.rope_table, None, columns),
    }
    own = arena._replace(data=arena.data.clone())
    caches = [
        (mine, theirs, order)
        for i, layer in enumerate(layers)
        for mine, theirs, order in zip(
            own.views(i, layer.kv_heads),
            arena.views(i, layer.kv_heads),
            (columns, of_v),
            strict=True,
        )
    ]
    for mine, theirs, order in caches:
        mine.copy_(take(theirs, None, None, None, order))
    logits = reference.decode_step(Stack(**{**vars(stack), **changed}), tokens, positions, own)
    batch = torch.arange(len(tokens), device=tokens.device)
    for mine, theirs, order in caches:
        theirs[batch, positions] = put_back(mine[batch, positions], None, None, order)
    return logits


REORDERED: dict[str, Callable] = {
    f.__name__: f
    for f in (
        rms_norm, add_rms_norm, qk_norm_rope, swiglu, attention, linear, linear_cross_entropy,
        decode_step,
    )
}  # fmt: skip


def reordered(op: str, seed: int) -> Callable:
    """The reference of an op in a random order, under the reference's own signature."""

    def run(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device
        return REORDERED[op](Orders(seed, device), *args, **kwargs)

    return run


@contextlib.contextmanager
def other_threads() -> Iterator[None]:
    """One thread where there are several, two where there is one: torch cuts sums by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
