"""What is known of `attention`: prompts, tokens, ragged rows and varlen documents as its cases."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._flops import of_attention, of_attention_bwd
from ...reference.attention import visible_keys, without_unseen
from ...reference.common import document_of
from ..equivalent import Orders, put_back, take, with_gradient
from .draw import ALL, Case, Draw, Inputs, grad, models
from .spec import OpSpec, checked


def attention_case(
    name: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    lq: int,
    lk: int,
    batch: int = 2,
    *,
    padding: list[int] | None = None,
    offsets: list[int] | None = None,
    documents: Sequence[int] | None = None,
    scale: float | None = None,
    strided: bool = False,
    draw: Callable[..., Tensor] = Draw.normal,
    **options,
) -> Case:
    """padding: masked keys at the left of each batch row. offsets: where each row's queries begin;
    keys beyond a row's end are NaN. documents: the lengths of those that the one row holds.
    strided: k and v are slices of longer caches, q of a wider projection. draw: of q and k."""

    def build(d: Draw) -> Inputs:
        extra = 3 if strided else 0
        q = draw(d, batch, lq, q_heads + extra, head_dim)[:, :, :q_heads]
        k = draw(d, batch, lk + extra, kv_heads, head_dim)[:, :lk]
        v = d.normal(batch, lk + extra, kv_heads, head_dim)[:, :lk]
        kwargs = {} if scale is None else {"scale": scale}
        if padding is not None:
            first = torch.tensor(padding, device=d.device)[:, None]
            kwargs["key_mask"] = torch.arange(lk, device=d.device) >= first
        if offsets is not None:
            kwargs["offsets"] = torch.tensor(offsets, device=d.device)
            for b, first in enumerate(offsets):
                k[b, first + lq :] = v[b, first + lq :] = math.nan
        if documents is not None:
            ends = [0, *itertools.accumulate(documents)]
            kwargs["cu_seqlens"] = torch.tensor(ends, device=d.device)
        return (grad(q), grad(k), grad(v)), kwargs

    return Case("attention", name, build, **options)


def varlen_case(
    name: str, q_heads: int, kv_heads: int, head_dim: int, documents: Sequence[int], **options
) -> Case:
    """One row of documents of these lengths, one after another."""
    total = sum(documents)
    return attention_case(
        name, q_heads, kv_heads, head_dim, total, total, 1, documents=documents, **options
    )


def mixed_lengths(total: int) -> list[int]:
    """Lengths of documents, from a sentence up to a long page, that fill `total` tokens."""
    cycle = itertools.cycle((40, 300, 700, 12, 150, 450, 90, 600, 25, 500, 205, 1024))
    found = []
    while total > 0:
        found.append(min(next(cycle), total))
        total -= found[-1]
    return found


def _varlen_cases() -> list[Case]:
    found = []
    for name, config in models().items():
        q, kv, d = config.num_query_heads[-1], config.num_kv_heads[-1], config.head_dim
        found.append(varlen_case(f"{name}_varlen", q, kv, d, (5, 1, 12, 0, 9)))
    short = [1 + 7 * i % 17 for i in range(60)]
    return found + [
        varlen_case("varlen_short", 8, 2, 64, short),
        varlen_case("varlen_one_document", 6, 2, 64, (150,)),
        varlen_case("varlen_ones", 8, 2, 64, (1,) * 40),
        varlen_case("varlen_empty_among_ones", 4, 1, 64, (0, 1, 1, 0, 0, 1, 5, 0)),
        varlen_case("varlen_off_every_block", 4, 2, 64, (63, 65, 127, 129, 31, 33, 17, 15)),
        varlen_case("varlen_on_blocks", 4, 2, 64, (64, 128, 32, 16)),
        varlen_case("varlen_long_among_short", 4, 2, 64, (*short[:20], 700, *short[20:40])),
        varlen_case("varlen_long_first", 4, 1, 64, (900, *short[:9]), dtypes=ALL[:1]),
        varlen_case("varlen_two_long", 6, 2, 64, (300, 1, 280)),
        varlen_case("varlen_strided", 8, 2, 64, (9, 1, 20, 3), strided=True),
        varlen_case("varlen_head_dim_1", 4, 2, 1, (3, 9, 1)),
        varlen_case("varlen_head_dim_20", 6, 2, 20, (33, 2, 40)),
        varlen_case("varlen_head_dim_128", 8, 2, 128, (40, 1, 33)),
        varlen_case("varlen_head_dim_256", 3, 1, 256, (10, 40)),
        varlen_case("varlen_one_head_a_group", 3, 3, 64, (17, 30, 1)),
        varlen_case("varlen_group_of_70", 70, 1, 20, (3, 1, 9), dtypes=ALL[:1]),
        varlen_case("varlen_scale", 8, 2, 64, (12, 7), scale=0.3),
        varlen_case("varlen_one_key_outweighs", 8, 2, 64, (20, 9), draw=Draw.outliers, scale=1e-5),
        varlen_case("varlen_broadcast_dy", 8, 2, 64, (12, 20), cotangent="broadcast"),
        varlen_case("varlen_strided_dy", 8, 2, 64, (12, 20), cotangent="strided"),
        varlen_case("varlen_nothing", 4, 1, 64, ()),
        varlen_case("varlen_empty", 4, 1, 64, (0, 0)),
    ]


def cases() -> list[Case]:
    found = []
    for name, config in models().items():
        q, kv, d = config.num_query_heads[-1], config.num_kv_heads[-1], config.head_dim
        found.append(attention_case(f"{name}_prompt", q, kv, d, 24, 24, batch=1))
        found.append(attention_case(f"{name}_token", q, kv, d, 1, 100, batch=4))
    return [
        *found,
        attention_case("two_keys", 4, 1, 64, 1, 2, batch=32),
        attention_case("one_head_a_group", 3, 3, 64, 17, 17),
        attention_case("head_dim_20", 4, 2, 20, 33, 33),
        attention_case("head_dim_1", 4, 2, 1, 9, 9),
        attention_case("head_dim_128", 8, 2, 128, 40, 70),
        attention_case("head_dim_256", 4, 1, 256, 70, 70, batch=1),
        attention_case("group_of_3", 6, 2, 64, 23, 40),
        # float32, as torch's own attention sums the gradients of these heads in half precision.
        attention_case("group_of_70", 70, 1, 20, 3, 20, batch=1, dtypes=ALL[:1]),
        attention_case("chunk", 8, 2, 64, 7, 30),
        attention_case("long", 4, 1, 64, 300, 700, batch=1),
        attention_case("long_prompt", 6, 2, 64, 333, 333, batch=1),
        attention_case("long_token", 8, 2, 64, 1, 1000, batch=1),
        attention_case("ragged_tokens", 8, 2, 64, 1, 90, 4, offsets=[0, 89, 5, 64]),
        attention_case("ragged_chunks", 8, 2, 64, 6, 150, 4, offsets=[0, 144, 60, 1]),
        attention_case("ragged_long", 4, 1, 64, 90, 600, offsets=[40, 510]),
        attention_case(
            "ragged_and_padded", 8, 2, 64, 5, 80, 3, padding=[0, 9, 70], offsets=[75, 7, 60]
        ),
        attention_case("scores_of_hundreds", 8, 2, 64, 40, 80, scale=3.0, dtypes=ALL[:1]),
        attention_case("one_key_outweighs", 8, 2, 64, 20, 20, draw=Draw.outliers, scale=1e-5),
        attention_case("broadcast_dy", 8, 2, 64, 12, 20, cotangent="broadcast"),
        attention_case("strided_dy", 8, 2, 64, 12, 20, cotangent="strided"),
        attention_case("left_padded_prompt", 8, 2, 64, 12, 12, padding=[0, 5]),
        attention_case("left_padded_token", 8, 2, 64, 1, 24, 16, padding=list(range(16))),
        attention_case("left_padded_chunk", 8, 2, 64, 4, 12, padding=[3, 10]),
        attention_case("scale", 8, 2, 64, 12, 12, scale=0.3),
        attention_case("strided_prompt", 8, 2, 64, 12, 12, strided=True),
        attention_case("strided_token", 8, 2, 64, 1, 24, batch=16, strided=True),
        attention_case("no_batch", 4, 1, 64, 3, 3, batch=0),
        attention_case("no_queries", 4, 1, 64, 0, 3),
        *_varlen_cases(),
    ]


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    """A single row is one new token after 512 others; more are a prompt of that length, from 512
    on also varlen documents of many lengths.
    """
    config = models()[model]
    heads = config.num_query_heads[layer], config.num_kv_heads[layer], config.head_dim

    def prompt(count: int) -> Case:
        name, keys = f"{model}_rows_{count}", 513 if count == 1 else count
        return attention_case(name, *heads, count, keys, batch=1)

    def documents(count: int) -> Case:
        return varlen_case(f"{model}_varlen_{count}", *heads, mixed_lengths(count))

    return checked(prompt, rows) + checked(documents, tuple(n for n in rows if n >= 512))


LONG = (16, 2048)  # sequences, keys of each: in 1_1B's last layer 64 MiB of keys and values


def long_tokens(model: str = "1_1B", layer: int = -1) -> Case:
    """Attention of a new token of each of LONG's sequences in one layer of a model."""
    config, (batch, keys) = models()[model], LONG
    heads = config.num_query_heads[layer], config.num_kv_heads[layer], config.head_dim
    check = attention_case(f"{model}_token_2x{keys}", *heads, 1, keys, 2)
    return attention_case(f"{model}_token_{batch}x{keys}", *heads, 1, keys, batch, check=check)


def _eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """One token's query heads become the rows of one small matrix, so that each key is read once:
    up to twelve times faster than enable_gqa in bfloat16."""
    batch, length, _, head_dim = q.shape
    one = length == 1
    queries = q.reshape(batch, k.shape[2], -1, head_dim) if one else q.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        queries,
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=not one,
        scale=scale,
        enable_gqa=not one,
    )
    return out.reshape(q.shape) if one else out.transpose(1, 2)


def _eager_varlen(cu_seqlens: Tensor, length: int) -> Callable:
    """The mask of whole documents is made beforehand, as a model does once for its layers."""
    document = document_of(cu_seqlens, length)
    mask = (document[:, None] == document).tril()

    def attention(q, k, v, cu_seqlens, scale=None):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def _by_document(cu_seqlens: Tensor) -> Callable:
    """One call of torch's for each document, whose lengths the host knows beforehand."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n]

    def attention(q, k, v, cu_seqlens, scale=None):
        parts = zip(*(t.transpose(1, 2).split(lengths, dim=2) for t in (q, k, v)), strict=True)
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        found = [F.scaled_dot_product_attention(*part, **options) for part in parts]
        return torch.cat(found, dim=2).transpose(1, 2)

    return attention


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    ends = kwargs.get("cu_seqlens")
    if ends is None:
        return {"eager": _eager}
    return {"eager": _eager_varlen(ends, args[0].shape[1]), "documents": _by_document(ends)}


def operations(args: tuple, kwargs: dict, backward: bool) -> int:
    q, k = args[:2]
    ends = kwargs.get("cu_seqlens")
    forward = of_attention(q, k, ends)
    return forward + of_attention_bwd(q, k, ends) if backward else forward


_FEW = 4  # queries whose roundings are too few to be typical


def reordered(
    orders: Orders,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Columns of q and k, which a score sums, and of v, which the backward does; the heads of a
    group, which the gradients of k and v sum; and where nothing but sums rounds, keys, with what
    each query sees of them, and queries.
    """
    group, lq, lk = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    if offsets is not None:
        k, v = without_unseen(k, v, lq, offsets)
    visible = visible_keys(lq, lk, key_mask, offsets, q.device)
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, lk)
        visible = visible & (document[:, None] == document)
    wide = q.dtype.itemsize >= 4
    # Every head of a group sees the same keys: only the queries have to come in the heads' order.
    heads, columns, of_v = orders.heads(k.shape[2], group), orders(q.shape[3]), orders(q.shape[3])
    queries, keys = (orders(lq), orders(lk)) if wide else (None, None)
    elsewhere = not wide and 0 < lq <= _FEW and q.numel() > 0 and orders.coin()
    visible = take(visible, None, None, queries, keys)
    real = visible.any(-1, keepdim=True)
    q = take(q, None, queries, heads, columns).transpose(1, 2)
    k = take(k, None, keys, None, columns).transpose(1, 2)
    v = take(v, None, keys, None, of_v).transpose(1, 2)
    if wide and q.numel():
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        out = _scored_twice(q, k, v, orders(q.shape[3]), visible | ~real, scale)
    elif elsewhere:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        out = rounded_elsewhere(q, k, v, visible | ~real, scale, orders.factor())
    else:
        # Half types round what each block of queries and each head gives k and v; torch has one
        # way for heads that are repeated and one for those that are not.
        out = F.scaled_dot_product_attention(
            q, k, v, None if bool(visible.all()) else visible, scale=scale, enable_gqa=group > 1
        )
    if key_mask is not None:
        out = out.masked_fill(~real, 0.0)
    return put_back(out.transpose(1, 2), None, queries, heads, of_v)


def _scored_twice(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, visible: Tensor, scale: float | None
) -> Tensor:
    """Attention whose backward makes the weights again, from the forward's log-sums and scores
    summed in another order: as right as from the same scores, and what a kernel does whose
    forward and backward have other blocks. Where scores are large it is far from the same: the
    weights no longer add up to 1. On some processors torch's own backward does it too."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    again = (take(t, None, None, None, order) for t in (q, k))
    first, second = (
        (a @ b.mT * scale).masked_fill(~visible, -math.inf) for a, b in ((q, k), tuple(again))
    )
    sums = with_gradient(first.logsumexp(-1, keepdim=True), second.logsumexp(-1, keepdim=True))
    return with_gradient(first.softmax(-1) @ v, (second - sums).exp() @ v)


def rounded_elsewhere(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, factor: float
) -> Tensor:
    """Attention in float32 that rounds what torch's rounds in a half type: the weights and their
    gradients, at another scale, and the output, of which the backward takes the share of the
    weights' sum. Of few queries few roundings decide, and no order of theirs changes one.
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q, k, v))

    def rounded(x: Tensor) -> Tensor:
        return (x * factor).to(dtype).to(wide) / factor

    scores = (q @ k.mT * scale).masked_fill(~visible, -math.inf)
    if scores.requires_grad:
        scores.register_hook(rounded)
    sums = scores.logsumexp(-1, keepdim=True)
    weights = (scores - sums.detach()).exp()
    out = with_gradient(rounded(weights), weights) @ v
    stored = out.detach().to(dtype).to(wide)
    return (out - stored * (sums - sums.detach())).to(dtype)


SPEC = OpSpec(
    "attention",
    outputs=("out",),
    cases=cases(),
    bench_cases=bench_cases,
    # The softmax amplifies the rounding of its scores, and torch orders even the reference's sums
    # by shape and machine.
    slack=4.0,
    baselines=baselines,
    operations=operations,
    reordered=reordered,
)
