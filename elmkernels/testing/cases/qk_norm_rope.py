"""What is known of `qk_norm_rope`: its cases, its caches, its baselines and its traffic."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...reference import rope_table
from ..equivalent import Orders, put_back, take
from .draw import HALF, LAYOUTS, TABLE_LENGTH, Case, Draw, Inputs, grad, models
from .spec import OpSpec, checked, total_bytes


def positions_from(starts: list[int], length: int, device: torch.device) -> Tensor:
    """int64 [len(starts), length]: row b counts up from starts[b], never under 0 (left padding)."""
    first = torch.tensor(starts, device=device)[:, None]
    return (first + torch.arange(length, device=device)).clamp(min=0)


def heads_case(
    name: str,
    q_heads: int = 4,
    kv_heads: int = 1,
    head_dim: int = 64,
    batch: int | None = 2,
    length: int = 5,
    *,
    norm: bool = True,
    wide: bool = False,
    starts: list[int] | None = None,
    draw: Callable[..., Tensor] = Draw.normal,
    table_length: int = TABLE_LENGTH,
    cache: int = 0,
    strided_cache: bool = False,
    **options,
) -> Case:
    """starts: the first position of each batch row, below 0 for left padding; None: one stride-0
    row of positions. cache: its length; 0 for none. batch None: tokens [length, width].
    """

    def build(d: Draw) -> Inputs:
        width = (q_heads + 2 * kv_heads) * head_dim
        shape = (length, width) if batch is None else (batch, length, width)
        qkv = draw(d, *shape)
        weights = [d.weight(head_dim, wide) if norm else None for _ in "qk"]
        if batch is None:
            positions = torch.arange(length, device=d.device).flip(0)
        elif starts is None:
            positions = torch.arange(length, device=d.device).expand(batch, length)
        else:
            positions = positions_from(starts, length, d.device)
        table = rope_table(table_length, head_dim, device=d.device)
        args = (grad(qkv), *weights, positions, q_heads, kv_heads, table)
        if not cache:
            return args, {}
        caches = [
            d.normal(batch, 2 * cache, kv_heads, head_dim)[:, :cache]
            if strided_cache
            else d.normal(batch, cache, kv_heads, head_dim)
            for _ in "kv"
        ]
        # Every row starts one slot later than the one above: ragged.
        first = [b % max(1, cache - length + 1) for b in range(batch)]
        slots = positions_from(first, length, d.device)
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        return args, {"k_cache": caches[0], "v_cache": caches[1], "slots": slots}

    return Case("qk_norm_rope", name, build, **options)


def cases() -> list[Case]:
    found = []
    for name, config in models().items():
        for layer in (0, config.num_transformer_layers - 1):
            q, kv = config.num_query_heads[layer], config.num_kv_heads[layer]
            found.append(heads_case(f"{name}_{q}_{kv}_heads", q, kv, config.head_dim, length=3))
    for head_dim in (2, 6, 20, 32, 80, 128, 256):
        found.append(heads_case(f"head_dim_{head_dim}", 3, 1, head_dim, length=20))
    found += [heads_case(name, 4, 1, 64, 3, 5, draw=lay) for name, lay in LAYOUTS.items()]
    return found + [
        heads_case("one_token", batch=1, length=1, starts=[2047]),
        heads_case("no_batch_dimension", batch=None, length=11),
        heads_case("no_batch", batch=0),
        heads_case("no_length", length=0),
        heads_case("no_tokens", batch=None, length=0),
        heads_case("one_head_a_group", 3, 3),
        heads_case("one_head", 1, 1),
        heads_case("many_tokens", 2, 1, length=260),
        heads_case("large", 16, 4, length=1061, batch=4, dtypes=(torch.bfloat16,)),
        heads_case("no_norm", norm=False),
        heads_case("no_norm_cached", norm=False, cache=9),
        heads_case("left_padded", batch=3, length=9, starts=[0, -3, -8]),
        heads_case("ragged", batch=3, starts=[0, 100, TABLE_LENGTH - 5]),
        heads_case("short_table", length=5, table_length=5),
        heads_case("huge", draw=Draw.huge),
        heads_case("outliers", draw=Draw.outliers),
        heads_case("tiny", draw=lambda d, *shape: d.normal(*shape, scale=3e-5)),
        heads_case("wide_weight", wide=True, dtypes=HALF),
        heads_case("wide_weight_head_dim_20", 3, 1, 20, length=20, wide=True, dtypes=HALF),
        heads_case("broadcast_dy", cotangent="broadcast"),
        heads_case("strided_dy", cotangent="strided"),
        heads_case("values_unused", unused=(2,)),
        heads_case("queries_unused", unused=(0,)),
        heads_case("cached_prompt", 16, 4, batch=2, length=7, cache=12, starts=[0, -2]),
        heads_case("cached_token", 16, 4, batch=3, length=1, cache=6, starts=[3, 0, 5]),
        heads_case("cached_last_slot", batch=1, length=4, cache=4),
        heads_case("cached_strided", batch=2, length=4, cache=9, strided_cache=True),
        heads_case("cached_transposed_qkv", batch=3, length=5, cache=9, draw=LAYOUTS["transposed"]),
        heads_case("cached_no_length", batch=2, length=0, cache=9),
        heads_case("cached_head_dim_6", 3, 1, 6, length=9, cache=20),
        heads_case("cached_wide_weight", cache=9, wide=True, dtypes=HALF),
    ]


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    config = models()[model]
    q, kv = config.num_query_heads[layer], config.num_kv_heads[layer]

    def case(count: int) -> Case:
        length = min(count, TABLE_LENGTH)
        batch = math.ceil(count / length)
        name = f"{model}_rows_{count}"
        return heads_case(name, q, kv, config.head_dim, batch, length)

    return checked(case, rows)


def with_caches(reference: Callable) -> Callable:
    """The reference, which knows no caches, under the op's signature, which writes them."""

    def qk_norm_rope(*args, k_cache=None, v_cache=None, slots=None, **kwargs):
        q, k, v = reference(*args, **kwargs)
        if k_cache is None:
            return q, k, v
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        k_cache[rows, slots], v_cache[rows, slots] = k, v
        return q, k_cache, v_cache

    return qk_norm_rope


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads x [..., heads, head_dim]; cos and sin [..., 1, head_dim], the
    sine's first half negated."""
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, rolled, sin).to(x.dtype)


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    """cos and sin are gathered beforehand, as a model does once for all of its layers. A rotation
    is then three passes: by a rolled copy and a sine whose first half is negated."""
    positions, table = args[3], args[6]
    cos, sin = table[positions].unsqueeze(-2).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return rotate(x if weight is None else F.rms_norm(x, weight.shape, weight, eps), cos, sin)

    def qk_norm_rope(qkv, q_weight, k_weight, positions, q_heads, kv_heads, table, eps=1e-6):
        heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1))
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=-2)
        return normed(q, q_weight, eps), normed(k, k_weight, eps), v

    return {"eager": qk_norm_rope}


def least_bytes(args: tuple, kwargs: dict, outputs: tuple[Tensor, ...], backward: bool) -> int:
    """v is a view: not read, not written. Of the table each token needs its own row."""
    qkv, q_weight, k_weight, positions = args[:4]
    q, k, v = outputs
    rows = positions.numel() * args[6].shape[1] * args[6].element_size()
    read = total_bytes(q, k, q_weight, k_weight, positions) + rows
    forward = read + total_bytes(q, k)
    if not backward:
        return forward
    return forward + read + total_bytes(q, k, v) + total_bytes(qkv, q_weight, k_weight)


def reordered(
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
    gradients sum; another scale of what is normalized."""
    shape, heads = qkv.shape[:-1], q_heads + 2 * kv_heads
    width = qkv.shape[-1] // heads
    tokens, columns = orders(math.prod(shape)), orders.pairs(width)
    of_q, of_k, of_v = orders(q_heads), orders(kv_heads), orders(kv_heads)
    of_all = torch.cat((of_q, q_heads + of_k, q_heads + kv_heads + of_v))
    scale = orders.scale(qkv.dtype) if q_weight is not None and k_weight is not None else 1.0
    found = reference.qk_norm_rope(
        scale * take(qkv.reshape(len(tokens), heads, width), tokens, of_all, columns).flatten(1),
        None if q_weight is None else take(q_weight, columns),
        None if k_weight is None else take(k_weight, columns),
        take(positions.expand(shape).reshape(-1), tokens),
        q_heads,
        kv_heads,
        take(rope_table, None, columns),
        eps * scale**2,
    )
    q, k, _ = (
        put_back(t, tokens, order, columns).view(*shape, *t.shape[1:])
        for t, order in zip(found, (of_q, of_k, of_v), strict=True)
    )
    return q, k, qkv.unflatten(-1, (heads, width))[..., q_heads + kv_heads :, :]


SPEC = OpSpec(
    "qk_norm_rope",
    outputs=("q", "k", "v"),
    cases=cases(),
    bench_cases=bench_cases,
    adapt=with_caches,
    baselines=baselines,
    least_bytes=least_bytes,
    reordered=reordered,
)
