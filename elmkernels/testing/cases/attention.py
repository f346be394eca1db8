"""Inputs to `attention`: prompts, tokens, rows of their own lengths, varlen documents."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .draw import ALL, Case, Draw, Inputs, grad, models


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


def _packed_cases() -> list[Case]:
    found = []
    for name, config in models().items():
        q, kv, d = config.num_query_heads[-1], config.num_kv_heads[-1], config.head_dim
        found.append(varlen_case(f"{name}_packed", q, kv, d, (5, 1, 12, 0, 9)))
    short = [1 + 7 * i % 17 for i in range(60)]
    return found + [
        varlen_case("varlen_short", 8, 2, 64, short),
        varlen_case("varlen_one_document", 6, 2, 64, (150,)),
        varlen_case("varlen_ones", 8, 2, 64, (1,) * 40),
        varlen_case("varlen_empty_among_ones", 4, 1, 64, (0, 1, 1, 0, 0, 1, 5, 0)),
        varlen_case("packed_off_every_block", 4, 2, 64, (63, 65, 127, 129, 31, 33, 17, 15)),
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
        varlen_case("packed_broadcast_dy", 8, 2, 64, (12, 20), cotangent="broadcast"),
        varlen_case("varlen_strided_dy", 8, 2, 64, (12, 20), cotangent="strided"),
        varlen_case("varlen_nothing", 4, 1, 64, ()),
        varlen_case("varlen_empty", 4, 1, 64, (0, 0)),
    ]


def attention_cases() -> list[Case]:
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
        *_packed_cases(),
    ]
