"""Inputs to the ops: the layer shapes of the four OpenELM models, and the awkward ones.

A case is a recipe. `make` draws its tensors: non-zero random data, rounded to a dtype, with
gradients required wherever a model would require them. `CASES[op]` is small enough for tests;
`bench_cases(op)` are the model's own layers at the row counts of decoding up to training.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...reference import rope_table
from .attention import attention_case, attention_cases, mixed_lengths, varlen_case
from .decoder import BENCH, decode_step_cases, linear_cases
from .draw import HALF, LAYOUTS, TABLE_LENGTH, Case, Draw, Inputs, grad, models
from .fused_linear import bench_fused, fused_cases
from .loss import bench_linear_cross_entropy, loss_cases

_NORM_SHAPES = {
    "one_row": (1, 1280),
    "one_dimension": (2048,),
    "no_rows": (0, 1280),
    "no_batch": (2, 0, 64),
    "no_columns": (4, 0),
    "width_1": (64, 1),
    "width_7": (64, 7),
    "width_33": (33, 33),
    "width_64": (2, 9, 12, 64),
    "width_1000": (5, 1000),
    "width_12289": (3, 12289),
    "many_rows": (515, 320),
    "many_short_rows": (2051, 24),
}


def _norm_cases(op: str, inputs: int) -> list[Case]:
    """`inputs` is how many row tensors the op takes before its weight."""

    def case(name: str, draw: Callable[[Draw], Tensor], wide=False, eps=None, **options) -> Case:
        def build(d: Draw) -> Inputs:
            rows = [grad(draw(d)) for _ in range(inputs)]
            kwargs = {} if eps is None else {"eps": eps}
            return (*rows, d.weight(rows[0].shape[-1], wide)), kwargs

        return Case(op, name, build, **options)

    found = [
        case(f"{name}_hidden", lambda d, n=config.model_dim: d.normal(2, 5, n))
        for name, config in models().items()
    ]
    found += [
        case(name, lambda d, shape=shape: d.normal(*shape)) for name, shape in _NORM_SHAPES.items()
    ]
    found += [case(name, lambda d, lay=lay: lay(d, 3, 5, 200)) for name, lay in LAYOUTS.items()]
    return found + [
        # Over 8 MiB: stores that go around the caches.
        case("large", lambda d: d.normal(1061, 2048), dtypes=(torch.float32,)),
        case("large_half", lambda d: d.normal(2113, 2048), dtypes=(torch.bfloat16,)),
        case("qkv_slice", lambda d: d.normal(2, 7, 18, 64)[:, :, 12:15]),
        case("huge", lambda d: d.huge(6, 1536)),
        case("outliers", lambda d: d.outliers(6, 1536)),
        case("tiny", lambda d: d.normal(6, 1536, scale=3e-5)),
        case("eps_0.01", lambda d: d.normal(6, 1280, scale=0.1), eps=0.01),
        case("wide_weight", lambda d: d.normal(2, 9, 1280), wide=True, dtypes=HALF),
        case("wide_weight_width_33", lambda d: d.normal(40, 33), wide=True, dtypes=HALF),
        case("broadcast_dy", lambda d: d.normal(2, 9, 1280), cotangent="broadcast"),
        case("strided_dy", lambda d: d.normal(2, 9, 200), cotangent="strided"),
    ]


def _mixed_layouts(d: Draw) -> Inputs:
    x = grad(LAYOUTS["row_slices"](d, 3, 5, 200))
    return (x, grad(LAYOUTS["transposed"](d, 3, 5, 200)), d.weight(200)), {}


def _add_rms_norm_cases() -> list[Case]:
    def plain(d: Draw) -> Inputs:
        return (grad(d.normal(2, 9, 1280)), grad(d.normal(2, 9, 1280)), d.weight(1280)), {}

    return [
        *_norm_cases("add_rms_norm", 2),
        Case("add_rms_norm", "mixed_layouts", _mixed_layouts),
        Case("add_rms_norm", "sum_unused", plain, unused=(1,)),
        Case("add_rms_norm", "normed_unused", plain, unused=(0,)),
    ]


def _swiglu_cases() -> list[Case]:
    def case(name: str, draw: Callable[[Draw], Tensor], **options) -> Case:
        return Case("swiglu", name, lambda d: ((grad(draw(d)),), {}), **options)

    found = [
        case(f"{name}_ffn_{n}", lambda d, n=n: d.normal(1, 3, 2 * n, scale=2.0))
        for name, config in models().items()
        for n in (config.ffn_dims[0], config.ffn_dims[-1])
    ]
    shapes = {
        "one_row": (1, 1536),
        "one_dimension": (1536,),
        "no_rows": (0, 1536),
        "no_columns": (4, 0),
        "width_1": (64, 2),
        "width_7": (33, 14),
        "width_33": (33, 66),
        "width_1000": (5, 2000),
        "many_rows": (515, 320),
    }
    found += [case(name, lambda d, shape=shape: d.normal(*shape)) for name, shape in shapes.items()]
    found += [case(name, lambda d, lay=lay: lay(d, 3, 5, 200)) for name, lay in LAYOUTS.items()]

    def huge(d: Draw) -> Tensor:
        # gate and up are multiplied, and float16 must hold the product times a cotangent.
        return d.uniform(9, 1536, scale=100.0 if d.dtype == torch.float16 else 1e5)

    return found + [
        case("huge", huge),
        case("large", lambda d: d.normal(531, 8192), dtypes=(torch.float32,)),
        case("large_half", lambda d: d.normal(1061, 8192), dtypes=(torch.bfloat16,)),
        case("tiny", lambda d: d.normal(9, 1536, scale=1e-3)),
        case("broadcast_dy", lambda d: d.normal(2, 9, 1536), cotangent="broadcast"),
        case("strided_dy", lambda d: d.normal(2, 9, 400), cotangent="strided"),
    ]


def positions_from(starts: list[int], length: int, device: torch.device) -> Tensor:
    """int64 [len(starts), length]: row b counts up from starts[b], never under 0 (left padding)."""
    first = torch.tensor(starts, device=device)[:, None]
    return (first + torch.arange(length, device=device)).clamp(min=0)


def _qk_case(
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
    row of positions. cache: its length; 0 for none. batch None: packed tokens [length, width].
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


def _qk_norm_rope_cases() -> list[Case]:
    found = []
    for name, config in models().items():
        for layer in (0, config.num_transformer_layers - 1):
            q, kv = config.num_query_heads[layer], config.num_kv_heads[layer]
            found.append(_qk_case(f"{name}_{q}_{kv}_heads", q, kv, config.head_dim, length=3))
    for head_dim in (2, 6, 20, 32, 80, 128, 256):
        found.append(_qk_case(f"head_dim_{head_dim}", 3, 1, head_dim, length=20))
    found += [_qk_case(name, 4, 1, 64, 3, 5, draw=lay) for name, lay in LAYOUTS.items()]
    return found + [
        _qk_case("one_token", batch=1, length=1, starts=[2047]),
        _qk_case("packed_tokens", batch=None, length=11),
        _qk_case("no_batch", batch=0),
        _qk_case("no_length", length=0),
        _qk_case("no_tokens", batch=None, length=0),
        _qk_case("one_head_a_group", 3, 3),
        _qk_case("one_head", 1, 1),
        _qk_case("many_tokens", 2, 1, length=260),
        _qk_case("large", 16, 4, length=1061, batch=4, dtypes=(torch.bfloat16,)),
        _qk_case("no_norm", norm=False),
        _qk_case("no_norm_cached", norm=False, cache=9),
        _qk_case("left_padded", batch=3, length=9, starts=[0, -3, -8]),
        _qk_case("ragged", batch=3, starts=[0, 100, TABLE_LENGTH - 5]),
        _qk_case("short_table", length=5, table_length=5),
        _qk_case("huge", draw=Draw.huge),
        _qk_case("outliers", draw=Draw.outliers),
        _qk_case("tiny", draw=lambda d, *shape: d.normal(*shape, scale=3e-5)),
        _qk_case("wide_weight", wide=True, dtypes=HALF),
        _qk_case("wide_weight_head_dim_20", 3, 1, 20, length=20, wide=True, dtypes=HALF),
        _qk_case("broadcast_dy", cotangent="broadcast"),
        _qk_case("strided_dy", cotangent="strided"),
        _qk_case("values_unused", unused=(2,)),
        _qk_case("queries_unused", unused=(0,)),
        _qk_case("cached_prompt", 16, 4, batch=2, length=7, cache=12, starts=[0, -2]),
        _qk_case("cached_token", 16, 4, batch=3, length=1, cache=6, starts=[3, 0, 5]),
        _qk_case("cached_last_slot", batch=1, length=4, cache=4),
        _qk_case("cached_strided", batch=2, length=4, cache=9, strided_cache=True),
        _qk_case("cached_transposed_qkv", batch=3, length=5, cache=9, draw=LAYOUTS["transposed"]),
        _qk_case("cached_no_length", batch=2, length=0, cache=9),
        _qk_case("cached_head_dim_6", 3, 1, 6, length=9, cache=20),
        _qk_case("cached_wide_weight", cache=9, wide=True, dtypes=HALF),
    ]


CASES: dict[str, list[Case]] = {
    "rms_norm": _norm_cases("rms_norm", 1),
    "add_rms_norm": _add_rms_norm_cases(),
    "qk_norm_rope": _qk_norm_rope_cases(),
    "swiglu": _swiglu_cases(),
    "attention": attention_cases(),
    "linear": linear_cases() + fused_cases(),
    "decode_step": decode_step_cases(),
    "linear_cross_entropy": loss_cases(),
}

BENCH_ROWS = (1, 8, 64, 512, 4096)


LONG = (16, 2048)  # sequences, keys of each: in 1_1B's last layer 64 MiB of keys and values


def long_tokens(model: str = "1_1B", layer: int = -1) -> Case:
    """Attention of a new token of each of LONG's sequences in one layer of a model."""
    config, (batch, keys) = models()[model], LONG
    heads = config.num_query_heads[layer], config.num_kv_heads[layer], config.head_dim
    check = attention_case(f"{model}_token_2x{keys}", *heads, 1, keys, 2)
    return attention_case(f"{model}_token_{batch}x{keys}", *heads, 1, keys, batch, check=check)


def bench_cases(
    op: str, rows: tuple[int, ...] = BENCH_ROWS, model: str = "1_1B", layer: int = -1
) -> list[Case]:
    """The op in one layer of one model, as many tokens at once as `rows` says. For attention a
    single row is one new token after 512 others; more rows are a prompt of that length, from 512 on
    also varlen documents of many lengths.
    """
    config = models()[model]
    if op == "linear_cross_entropy":
        return bench_linear_cross_entropy(model, config, rows)
    if op in BENCH:
        fused = bench_fused(model, config, rows) if op == "linear" else []
        return BENCH[op](model, config, rows) + fused
    q, kv = config.num_query_heads[layer], config.num_kv_heads[layer]
    d, n, ffn = config.head_dim, config.model_dim, config.ffn_dims[layer]

    def build(count: int) -> Case:
        name = f"{model}_rows_{count}"
        if op == "swiglu":
            return Case(op, name, lambda g: ((grad(g.normal(count, 2 * ffn)),), {}))
        if op == "qk_norm_rope":
            length = min(count, TABLE_LENGTH)
            return _qk_case(name, q, kv, d, math.ceil(count / length), length)
        if op == "attention":
            return attention_case(name, q, kv, d, count, 513 if count == 1 else count, batch=1)
        inputs = 2 if op == "add_rms_norm" else 1
        return Case(
            op,
            name,
            lambda g: ((*(grad(g.normal(count, n)) for _ in range(inputs)), g.weight(n)), {}),
        )

    def pack(count: int) -> Case:
        return varlen_case(f"{model}_packed_{count}", q, kv, d, mixed_lengths(count))

    builders = [(n, build) for n in rows]
    if op == "attention":
        builders += [(n, pack) for n in rows if n >= 512]
    # Kernels of 512 rows already split them among threads and chunks.
    return [replace(make(n), check=make(512) if n > 512 else None) for n, make in builders]
