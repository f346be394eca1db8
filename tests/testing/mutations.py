"""Kernels that are wrong in one thing: MUTATIONS = {op: {what is wrong: a function like the op}}.

Each computes what its op's reference does, forward and backward, but for one mistake that a kernel
could make and that changes little: of a rounding, of a sum's accuracy, at an edge, in a gradient.
"""

import math
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from elmkernels import reference
from elmkernels.reference.attention import visible_keys, without_unseen
from elmkernels.reference.common import document_of
from elmkernels.reference.qk_norm_rope import rotate
from elmkernels.testing.cases.decode_step import with_written
from elmkernels.weights.formats import Affine

qk_norm_rope = reference.qk_norm_rope


def through(value: Tensor, other: Tensor) -> Tensor:
    """value, whose gradient is other's."""
    return value.detach() + (other - other.detach())


def truncated(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored towards zero; float32 loses six bits."""
    near = wide.detach().to(dtype)
    if dtype == torch.float32:
        return through((near.contiguous().view(torch.int32) & -64).view(dtype), wide)
    down = torch.nextafter(near, torch.zeros_like(near))
    found = torch.where(near.float().abs() > wide.detach().float().abs(), down, near)
    return through(found, wide.to(dtype))


def short(x: Tensor) -> Tensor:
    """The 11 bits that a tensor core takes of each float32."""
    if x.dtype != torch.float32:
        return x
    return through((x.detach().contiguous().view(torch.int32) & -8192).view(x.dtype), x)


def coarse(x: Tensor) -> Tensor:
    """Rounded to bfloat16, in whatever dtype."""
    return through(x.detach().bfloat16().to(x.dtype), x)


def in_parts(part: Callable[[slice], Tensor], n: int, size: int = 16) -> Tensor:
    """The sum of the parts of n columns with an accumulator no wider than they are."""
    found = part(slice(0, size))
    for start in range(size, n, size):
        found = found + part(slice(start, start + size))
    return found


def without_last_row(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight for each row, of which the last gives no gradient."""
    rows = weight.expand(math.prod(shape[:-1]), -1)
    return torch.cat((rows[:-1], rows[-1:].detach())).view(shape)


def row_by_row(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight for each row: their gradients are added one by one, in its dtype."""
    found = [weight * 1 for _ in range(math.prod(shape[:-1]))]
    return torch.stack(found).view(shape)


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    mean: Callable = lambda x: x.float().square().mean(-1, keepdim=True),
    root: Callable = lambda mean, eps: torch.rsqrt(mean + eps),
    store: Callable = lambda y, dtype: y.to(dtype),
    of_rows: Callable = lambda weight, shape: weight,
    rounds: bool = True,
) -> Tensor:
    """rms_norm, each step of it exchangeable."""
    y = x.float() * root(mean(x), eps)
    return store((y.to(x.dtype) if rounds else y) * of_rows(weight, x.shape), x.dtype)


def _sum(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


NORM = {
    "no eps": partial(norm, root=lambda mean, eps: torch.rsqrt(mean)),
    "eps outside the root": partial(norm, root=lambda mean, eps: 1 / (mean.sqrt() + eps)),
    "root of 12 bits": partial(norm, root=lambda m, eps: torch.rsqrt(m + eps) * (1 + 2**-13)),
    "squares rounded": partial(norm, mean=lambda x: coarse(x.float()).square().mean(-1, True)),
    "mean of n - 1": partial(norm, mean=lambda x: _sum(x.float()) / max(1, x.shape[-1] - 1)),
    "last column left out": partial(
        norm, mean=lambda x: _sum(x.float()[..., :-1]) / max(1, x.shape[-1])
    ),
    "narrow sum": partial(
        norm,
        mean=lambda x: in_parts(lambda s: _sum(x[..., s]), x.shape[-1]).float() / x.shape[-1],
    ),
    "no rounding before the weight": partial(norm, rounds=False),
    "truncated": partial(norm, store=truncated),
    "weight shifted": lambda x, w, *a, **k: norm(x, w.roll(1), *a, **k),
    "weight rounded": lambda x, w, *a, **k: norm(x, coarse(w), *a, **k),
    "gradient without the mean's": partial(
        norm, root=lambda mean, eps: torch.rsqrt(mean.detach() + eps)
    ),
    "weight's gradient without the last row": partial(norm, of_rows=without_last_row),
    "weight's gradient in a narrow sum": partial(norm, of_rows=row_by_row),
}


def add_norm(mutation: Callable) -> Callable:
    """add_rms_norm with a mutation of the norm."""

    def add_rms_norm(x, residual, weight, *args, **kwargs):
        total = x + residual
        return mutation(total, weight, *args, **kwargs), total

    return add_rms_norm


def _sum_not_rounded(x, residual, weight, eps=1e-6):
    total = x.float() + residual.float()
    return (normalized(total, eps).to(x.dtype) * weight).to(x.dtype), total.to(x.dtype)


def normalized(wide: Tensor, eps: float) -> Tensor:
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


ADD_NORM = {name: add_norm(mutation) for name, mutation in NORM.items()} | {
    "sum not rounded before the norm": _sum_not_rounded,
    "residual's gradient without the norm's": lambda x, r, w, *a, **k: (
        reference.rms_norm(x + r.detach(), w, *a, **k), x + r,
    ),
    "sum's gradient left out": lambda x, r, w, *a, **k: (
        reference.rms_norm(x + r, w, *a, **k), (x + r).detach() + 0 * x,
    ),
}  # fmt: skip


def heads(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    q_heads: int,
    kv_heads: int,
    table: Tensor,
    eps: float = 1e-6,
    norm: Callable = norm,
    turn: Callable = rotate,
    keep_wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """qk_norm_rope, with a norm and a rotation to exchange."""
    split = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1))
    q, k, v = split.split((q_heads, kv_heads, kv_heads), dim=-2)
    cos, sin = table[positions].unsqueeze(-2).chunk(2, dim=-1)
    found = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x = normalized(x.float(), eps) * weight if keep_wide else norm(x, weight, eps)
        found.append(turn(x, cos, sin).to(qkv.dtype))
    return *found, v


def _turned(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _interleaved(x, cos, sin):
    a, b = x.float()[..., ::2], x.float()[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def _by_table(change: Callable) -> Callable:
    def mutated(qkv, qw, kw, positions, q, kv, table, *args, **kwargs):
        return qk_norm_rope(qkv, qw, kw, positions, q, kv, change(table), *args, **kwargs)

    return mutated


HEADS = {
    f"norm: {name}": partial(heads, norm=mutation)
    for name, mutation in NORM.items()
    if name != "truncated"
} | {
    "kept wide after the norm": partial(heads, keep_wide=True),
    "truncated": partial(heads, turn=lambda x, c, s: truncated(_turned(x, c, s), x.dtype)),
    "neighbours rotated": partial(heads, turn=_interleaved),
    "turned the other way": partial(heads, turn=lambda x, c, s: _turned(x, c, -s)),
    "gradient not turned back": partial(
        heads, turn=lambda x, c, s: through(_turned(x, c, s), x.float())
    ),
    "rotation rounded": partial(
        heads, turn=lambda x, c, s: _turned(x, coarse(c), coarse(s))
    ),
    "narrow rotation": partial(
        heads, turn=lambda x, c, s: rotate(x, c.to(x.dtype), s.to(x.dtype))
    ),
    "position before": _by_table(lambda table: table.roll(1, 0)),
    "angles of 12 bits": _by_table(lambda table: table * (1 + 2**-13)),
    "key by the query's weight": lambda x, qw, kw, *a, **k: qk_norm_rope(x, qw, qw, *a, **k),
    "values' gradient left out": lambda x, *a, **k: (
        *qk_norm_rope(x, *a, **k)[:2], qk_norm_rope(x.detach(), *a, **k)[2] + 0 * x.sum(),
    ),
}  # fmt: skip


def gated(
    gate_up: Tensor,
    sigmoid: Callable = torch.sigmoid,
    round_silu: Callable = lambda silu, dtype: silu.to(dtype),
    store: Callable = lambda y, dtype: y.to(dtype),
) -> Tensor:
    """swiglu, with a sigmoid and a rounding to exchange."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = gate.float() * sigmoid(gate.float())
    return store(round_silu(silu, gate.dtype) * up, gate.dtype)


SWIGLU = {
    "gate and up exchanged": lambda x: reference.swiglu(torch.cat(x.chunk(2, -1)[::-1], -1)),
    "silu not rounded": partial(gated, round_silu=lambda silu, dtype: silu),
    "truncated": partial(gated, store=truncated),
    "silu truncated": partial(gated, round_silu=truncated),
    "sigmoid of 12 bits": partial(gated, sigmoid=lambda x: torch.sigmoid(x) * (1 + 2**-13)),
    "sigmoid of 18 bits": partial(gated, sigmoid=lambda x: torch.sigmoid(x) * (1 + 2**-19)),
    "sigmoid rounded": partial(gated, sigmoid=lambda x: coarse(torch.sigmoid(x))),
    "sigmoid of a rounded gate": partial(gated, sigmoid=lambda x: torch.sigmoid(coarse(x))),
    "gradient of a fixed sigmoid": partial(gated, sigmoid=lambda x: torch.sigmoid(x).detach()),
    "gate's gradient left out": lambda x: through(
        reference.swiglu(x), F.silu(x.chunk(2, -1)[0].detach()) * x.chunk(2, -1)[1]
    ),
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scores: Callable = lambda q, k: q @ k.transpose(-1, -2),
    sight: Callable = lambda visible: visible,
    weigh: Callable = lambda scores: scores.softmax(-1),
    sum_up: Callable = lambda p, v: p @ v,
    share: Callable = lambda t, group: t.repeat_interleave(group, dim=2),
) -> Tensor:
    """attention in float32, each step of it exchangeable."""
    dtype, lq, lk, group = q.dtype, q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if offsets is not None:
        k, v = without_unseen(k, v, lq, offsets)
    visible = visible_keys(lq, lk, key_mask, offsets, q.device)
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, lk)
        visible = visible & (document[:, None] == document)
    visible = sight(visible)
    q, k, v = (
        t.transpose(1, 2).float() for t in (q, share(k, group), share(v, group))
    )  # fmt: skip
    s = scores(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = weigh(s.masked_fill(~visible, -math.inf)).nan_to_num(0.0)
    out = sum_up(p, v).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.to(dtype).transpose(1, 2)


def _next_too(visible: Tensor) -> Tensor:
    return visible | F.pad(visible, (1, 0))[..., :-1]


def _last_left_out(visible: Tensor) -> Tensor:
    """Without the last key that each query sees, unless it is the only one."""
    last = visible & ~F.pad(visible, (0, 1))[..., 1:]
    return visible & ~(last & (visible.sum(-1, keepdim=True) > 1))


def _first_left_out(visible: Tensor) -> Tensor:
    return _last_left_out(visible.flip(-1)).flip(-1)


def _of_one_head(t: Tensor, group: int) -> Tensor:
    """Only the first query head of each group gives its key head a gradient."""
    parts = torch.stack((t, *[t.detach()] * (group - 1)), dim=3)
    return parts.flatten(2, 3)


def _without_mean(s: Tensor) -> Tensor:
    """softmax whose gradient takes its sum for a constant."""
    return (s - s.logsumexp(-1, keepdim=True).detach()).exp()


def _recomputed(s: Tensor) -> Tensor:
    """The backward's weights from a log-sum rounded to bfloat16."""
    sums = s.logsumexp(-1, keepdim=True)
    return through(s.softmax(-1), (s - (sums + (coarse(sums) - sums).detach())).exp())


def _by_blocks(p: Tensor, v: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    keys = p.shape[-1]
    return in_parts(lambda s: (p[..., s] @ v[..., s, :]).to(dtype), keys).float()


def _scaled(factor: float) -> Callable:
    return lambda q, k: factor * (q @ k.transpose(-1, -2))


ATTENTION = {
    "sees the next key": partial(attend, sight=_next_too),
    "last key left out": partial(attend, sight=_last_left_out),
    "first key left out": partial(attend, sight=_first_left_out),
    "scores of 11 bits": partial(attend, scores=lambda q, k: short(q) @ short(k).mT),
    "scores of rounded keys": partial(attend, scores=lambda q, k: q @ coarse(k).mT),
    "scores rounded": partial(attend, scores=lambda q, k: coarse(q @ k.mT)),
    "narrow scores": partial(
        attend, scores=lambda q, k: in_parts(
            lambda s: (q[..., s] @ k[..., s].mT).bfloat16(), q.shape[-1]
        ).float(),
    ),
    "scores off by 2^-10": partial(attend, scores=_scaled(1 + 2**-10)),
    "scores off by 2^-14": partial(attend, scores=_scaled(1 + 2**-14)),
    "exp2 by a short constant": partial(attend, scores=_scaled(1.4427 * math.log(2))),
    "weights rounded": partial(attend, weigh=lambda s: coarse(s.softmax(-1))),
    "values of 11 bits": partial(attend, sum_up=lambda p, v: short(p) @ short(v)),
    "narrow sum": partial(attend, sum_up=_by_blocks),
    "heads in another order": partial(attend, share=lambda t, group: t.repeat(1, 1, group, 1)),
    "gradients of one head of a group": partial(attend, share=_of_one_head),
    "gradient without the softmax's mean": partial(attend, weigh=_without_mean),
    "gradient by a rounded log-sum": partial(attend, weigh=_recomputed),
    "gradient by rounded weights": partial(
        attend, weigh=lambda s: through(s.softmax(-1), coarse(s.softmax(-1)))
    ),
    "truncated": lambda q, *a, **k: truncated(
        attend(q.float(), *(t.float() for t in a), **k), q.dtype
    ),
}  # fmt: skip


def multiply(
    x: Tensor,
    weight,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
    residual: Tensor | None = None,
    norm_by: Callable = reference.rms_norm,
    product: Callable = F.linear,
    gate_by: Callable = reference.swiglu,
    add: Callable = lambda y, residual: residual + y,
) -> Tensor:
    """linear, each step of it exchangeable."""
    if norm is not None:
        x = norm_by(x, norm, eps)
    y = product(x, reference.dense(weight, x.dtype))
    y = gate_by(y) if swiglu else y
    return y if residual is None else add(y, residual)


def _wide_sum(x, w):
    return x.float() @ w.float().T


def _groups(change: Callable) -> Callable:
    """linear with something done to the scales or biases of a weight."""

    def mutated(x, weight, *args, **kwargs):
        if isinstance(weight, Affine):
            weight = change(weight)
        return reference.linear(x, weight, *args, **kwargs)

    return mutated


LINEAR = {
    "last column left out": partial(
        multiply, product=lambda x, w: F.linear(x[..., :-1], w[:, :-1])
    ),
    "last output by the one before": partial(
        multiply, product=lambda x, w: F.linear(x, torch.cat((w[:-1], w[-2:-1])))
    ),
    "narrow sum": partial(
        multiply, product=lambda x, w: in_parts(
            lambda s: F.linear(x[..., s], w[:, s]), x.shape[-1]
        ),
    ),
    "11 bits": partial(multiply, product=lambda x, w: F.linear(short(x), short(w))),
    "weight rounded": partial(multiply, product=lambda x, w: F.linear(x, coarse(w))),
    "truncated": partial(multiply, product=lambda x, w: truncated(_wide_sum(x, w), x.dtype)),
    "off by 2^-9": partial(
        multiply, product=lambda x, w: (_wide_sum(x, w) * (1 + 2**-9)).to(x.dtype)
    ),
    "x's gradient by a rounded weight": partial(
        multiply, product=lambda x, w: through(F.linear(x, w), F.linear(x, coarse(w)))
    ),
    "weight's gradient without the last row": partial(
        multiply, product=lambda x, w: torch.cat(
            (F.linear(x[:-1], w), F.linear(x[-1:], w.detach()))
        ),
    ),
    "weight's gradient in a narrow sum": partial(
        multiply, product=lambda x, w: torch.cat([F.linear(row[None], w) for row in x])
        if len(x) else F.linear(x, w),
    ),
    "biases of the next group": _groups(lambda w: replace(w, biases=w.biases.roll(1, 1))),
    "scales of the next group": _groups(lambda w: replace(w, scales=w.scales.roll(1, 1))),
    "scales rounded": _groups(lambda w: replace(w, scales=coarse(w.scales))),
    "biases left out": _groups(lambda w: replace(w, biases=0 * w.biases)),
    "added before it is gated": lambda x, w, norm=None, eps=1e-6, swiglu=False, residual=None:
        reference.linear(x, w, norm, eps, swiglu, None if residual is None else 2 * residual),
} | {
    f"norm: {name}": partial(multiply, norm_by=mutation)
    for name, mutation in NORM.items()
    if name not in ("no rounding before the weight",)
} | {
    f"swiglu: {name}": partial(multiply, gate_by=mutation) for name, mutation in SWIGLU.items()
}  # fmt: skip


def loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    logits_of: Callable = F.linear,
    log_sum: Callable = lambda rows: rows.logsumexp(-1),
    picked: Callable = lambda rows, at: rows.gather(1, at[:, None])[:, 0],
    average: Callable = lambda rows: rows.mean(-1),
    count: Callable = lambda real: real.sum(),
) -> Tensor:
    """linear_cross_entropy, each step of it exchangeable."""
    logits = logits_of(hidden, weight.to(hidden.dtype))
    rows, flat = logits.float().reshape(targets.numel(), -1), targets.reshape(-1)
    real = flat != ignore_index
    sums = log_sum(rows)
    losses = sums - (1 - label_smoothing) * picked(rows, flat.where(real, 0))
    losses = losses - label_smoothing * average(rows) + z_loss * sums.square()
    losses = losses * real
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / count(real).clamp(min=1)


LOSS = {
    "not shifted by the largest": partial(loss, log_sum=lambda rows: rows.exp().sum(-1).log()),
    "last of the vocabulary left out": partial(
        loss, log_sum=lambda rows: rows[:, :-1].logsumexp(-1)
    ),
    "log-sum rounded": partial(loss, log_sum=lambda rows: coarse(rows.logsumexp(-1))),
    "log-sum of 18 bits": partial(loss, log_sum=lambda r: r.logsumexp(-1) * (1 + 2**-19)),
    "log-sum of rounded logits": partial(loss, log_sum=lambda rows: coarse(rows).logsumexp(-1)),
    "gradient of a fixed log-sum": partial(loss, log_sum=lambda r: r.logsumexp(-1).detach()),
    "target of the next class": partial(
        loss, picked=lambda r, at: r.gather(1, ((at + 1) % r.shape[1])[:, None])[:, 0]
    ),
    "gradient without the target's": partial(
        loss, picked=lambda r, at: r.gather(1, at[:, None])[:, 0].detach()
    ),
    "smoothing's gradient left out": partial(loss, average=lambda r: r.mean(-1).detach()),
    "no z-loss": lambda *a, z_loss=0.0, **k: loss(*a, **k),
    "no smoothing": lambda *a, label_smoothing=0.0, **k: loss(*a, **k),
    "the mean of all": partial(loss, count=lambda real: torch.ones_like(real).sum()),
    "logits in a narrow sum": partial(
        loss, logits_of=lambda h, w: in_parts(
            lambda s: F.linear(h[..., s], w[:, s]), h.shape[-1]
        ),
    ),
    "logits of 11 bits": partial(loss, logits_of=lambda h, w: F.linear(short(h), short(w))),
    "logits truncated": partial(
        loss, logits_of=lambda h, w: truncated(h.float() @ w.float().T, h.dtype)
    ),
    "hidden's gradient by a rounded weight": partial(
        loss, logits_of=lambda h, w: through(F.linear(h, w), F.linear(h, coarse(w)))
    ),
    "hidden's gradient in a narrow sum": partial(
        loss, logits_of=lambda h, w: torch.cat(
            [F.linear(h * 1, w[i : i + 8]) for i in range(0, len(w), 8)], dim=-1
        ),
    ),
    "weight's gradient without the last row": partial(
        loss, logits_of=lambda h, w: torch.cat(
            (F.linear(h[:-1], w), F.linear(h[-1:], w.detach()))
        ),
    ),
    "weight's gradient in a narrow sum": partial(
        loss, logits_of=lambda h, w: F.linear(h, w)
        if h.dim() == 1
        else torch.stack([F.linear(row, w * 1) for row in h.flatten(0, -2)]).unflatten(
            0, h.shape[:-1]
        ),
    ),
}  # fmt: skip


def step(part: str, mutation: Callable) -> Callable:
    """decode_step with another function for one of its parts."""
    plain = reference.decode_step
    changed = types.FunctionType(plain.__code__, plain.__globals__ | {part: mutation})
    changed.__defaults__ = plain.__defaults__
    return with_written(changed)


def _later(change: int) -> Callable:
    def mutated(stack, tokens, positions, arena, **kwargs):
        moved = (positions + change).clamp(0, len(stack.rope_table) - 1)

        def heads(qkv, q_norm, k_norm, place, *args):
            return qk_norm_rope(qkv, q_norm, k_norm, moved[:, None], *args)

        return step("qk_norm_rope", heads)(stack, tokens, positions, arena, **kwargs)

    return mutated


DECODE_STEP = {
    f"{part}: {name}": step(part, mutation)
    for part, mutations in {
        "rms_norm": NORM, "qk_norm_rope": HEADS, "attention": ATTENTION, "swiglu": SWIGLU,
        "linear": LINEAR,
    }.items()
    for name, mutation in mutations.items()
    if "gradient" not in name and "norm: " not in name and "swiglu: " not in name
} | {"a position later": _later(1)}  # fmt: skip

MUTATIONS: dict[str, dict[str, Callable]] = {
    "rms_norm": NORM,
    "add_rms_norm": ADD_NORM,
    "qk_norm_rope": HEADS,
    "swiglu": SWIGLU,
    "attention": ATTENTION,
    "linear": LINEAR,
    "linear_cross_entropy": LOSS,
    "decode_step": DECODE_STEP,
}
