"""Mutations of attention, linear, linear_cross_entropy and decode_step."""

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
from elmkernels.testing.cases.decode_step import with_written
from elmkernels.weights.formats import Affine, form_of

from .of_rows import HEADS, NORM, SWIGLU
from .parts import coarse, in_parts, short, through, truncated

qk_norm_rope = reference.qk_norm_rope


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
    activations: str | None = None,
    norm_by: Callable = reference.rms_norm,
    product: Callable = F.linear,
    gate_by: Callable = reference.swiglu,
    add: Callable = lambda y, residual: residual + y,
) -> Tensor:
    """linear, each step of it exchangeable."""
    if norm is not None:
        x = norm_by(x, norm, eps)
    if activations is not None and form_of(weight).takes_int8:
        x = reference.int8_rows(x)
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
    "added before it is gated": lambda x, w, norm=None, eps=1e-6, swiglu=False, residual=None, **k:
        reference.linear(x, w, norm, eps, swiglu, None if residual is None else 2 * residual, **k),
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


def _among(sight: Callable) -> Callable:
    """Tokens of a pass that see others of their sequence than they should: sight(seen [n, keys],
    the others of each one's sequence [n, n], positions [n])."""

    def mutated(stack, tokens, positions, arena, sequences=None, **kwargs):
        if sequences is None:
            raise NotImplementedError("one token of each sequence")
        others = (sequences[:, None] == sequences) & ~torch.eye(len(tokens), dtype=torch.bool)

        def attention(q, k, v, seen):
            return reference.attention(q, k, v, sight(seen.clone(), others, positions))

        call = (stack, tokens, positions, arena)
        return step("attention", attention)(*call, sequences=sequences, **kwargs)

    return mutated


def _seen_as(value: bool) -> Callable:
    def sight(seen: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        for row, other in others.nonzero().tolist():
            seen[row, positions[other]] = value
        return seen

    return sight


DECODE_STEP = {
    f"{part}: {name}": step(part, mutation)
    for part, mutations in {
        "rms_norm": NORM, "qk_norm_rope": HEADS, "attention": ATTENTION, "swiglu": SWIGLU,
        "linear": LINEAR,
    }.items()
    for name, mutation in mutations.items()
    if "gradient" not in name and "norm: " not in name and "swiglu: " not in name
} | {
    "a position later": _later(1),
    "tokens of the same pass aren't seen": _among(_seen_as(False)),
    "tokens behind it in the pass are seen": _among(_seen_as(True)),
}  # fmt: skip
