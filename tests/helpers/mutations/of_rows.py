"""Mutations of the norms, qk_norm_rope and swiglu."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from elmkernels import reference
from elmkernels.reference.qk_norm_rope import rotate

from .parts import coarse, in_parts, row_by_row, through, truncated, without_last_row

qk_norm_rope = reference.qk_norm_rope


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
