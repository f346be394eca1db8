"""What is known of `linear`: its cases, its baselines, its traffic and its products."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops._flops import of_linear
from ...weights.formats import Weight
from ...weights.packed12 import pack_weight
from ..equivalent import Orders, flat_rows, put_back, take
from ._linear_fused import bench_fused, fused_cases
from .draw import ALL, LAYOUTS, Case, Draw, Inputs, grad, models
from .spec import OpSpec
from .weights import FORMS, dtypes_of, many_escapes, weight


def _linear_case(
    name: str,
    form: str,
    shape: tuple[int, ...],
    n: int,
    *,
    draw: Callable[..., Tensor] = Draw.normal,
    draw_weight: Callable[[Draw], Weight] | None = None,
    train: bool = False,
    activations: str | None = None,
    **options,
) -> Case:
    """shape: of x. train: x requires a gradient, and so does a plain weight."""

    def build(d: Draw) -> Inputs:
        x = draw(d, *shape)
        w = weight(d, form, n, shape[-1]) if draw_weight is None else draw_weight(d)
        if train:
            x, w = grad(x), grad(w) if isinstance(w, Tensor) else w
        return (x, w), {} if activations is None else {"activations": activations}

    options = {"dtypes": dtypes_of(form)} | options
    return Case("linear", name, build, **options)


def _plain_cases() -> list[Case]:
    """Few rows stream the weight as it is stored; from 9 rows on a dense product takes over."""
    found = []
    for form in FORMS:
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33):
            found.append(_linear_case(f"{form}_rows_{rows}", form, (rows, 256), 70))
        found += [
            _linear_case(f"{form}_gradient_rows_2", form, (2, 192), 70, train=True),
            _linear_case(f"{form}_gradient_rows_17", form, (17, 192), 70, train=True),
            # More than one block of dense rows: of half types, two roundings for one. Large, since
            # that is near what the rule allows.
            _linear_case(f"{form}_gradient_blocks", form, (33, 256), 3000, train=True),
            _linear_case(f"{form}_rows_9_blocks", form, (9, 64), 2100),
            _linear_case(f"{form}_many_outputs", form, (3, 64), 1031),
            _linear_case(f"{form}_one_output", form, (4, 320), 1),
            _linear_case(f"{form}_one_dimension", form, (128,), 33),
            _linear_case(f"{form}_three_dimensions", form, (2, 3, 128), 33),
            _linear_case(f"{form}_no_rows", form, (0, 128), 33),
            _linear_case(f"{form}_no_batch", form, (2, 0, 128), 33),
            _linear_case(f"{form}_huge", form, (3, 192), 70, draw=_huge),
            _linear_case(f"{form}_outliers", form, (3, 192), 70, draw=Draw.outliers),
            _linear_case(f"{form}_k_64", form, (2, 64), 40),
            _linear_case(f"{form}_k_320", form, (7, 320), 40),
        ]
        for layout in ("row_slices", "transposed", "last_stride_2", "broadcast_rows"):
            # Two times three rows, of the columns that every group divides.
            draw = LAYOUTS[layout]
            found.append(_linear_case(f"{form}_{layout}", form, (2, 3, 192), 50, draw=draw))
    for form in ("affine8_32", "affine4_32"):
        for k in (32, 96, 160, 224):
            found.append(_linear_case(f"{form}_k_{k}", form, (5, k), 40))
    for form in ("plain", "packed12"):
        for k in (1, 7, 31, 33, 200, 1000):
            found.append(_linear_case(f"{form}_k_{k}", form, (5, k), 40))
    found += _other_scales()
    found += [
        _linear_case("plain_no_outputs", "plain", (2, 64), 0),
        _linear_case(
            "plain_strided_rows",
            "plain",
            (3, 200),
            40,
            draw_weight=lambda d: d.normal(40, 333, scale=0.07)[:, 5:205],
        ),
        _linear_case(
            "plain_transposed_weight",
            "plain",
            (3, 200),
            40,
            draw_weight=lambda d: d.normal(200, 40, scale=0.07).T,
        ),
        _linear_case(
            "packed12_many_escapes",
            "packed12",
            (4, 300),
            70,
            draw_weight=lambda d: pack_weight(many_escapes(d, 70, 300)),
        ),
        _linear_case(
            "packed12_many_escapes_rows_12",
            "packed12",
            (12, 300),
            70,
            draw_weight=lambda d: pack_weight(many_escapes(d, 70, 300)),
        ),
    ]
    return found + _layer_shapes() + _int8_cases()


def _int8_cases() -> list[Case]:
    """Activations rounded to 8 bits, of few rows and many; a block of codes that is not whole."""
    found = []
    for form in ("affine8_64", "affine8_32", "affine4_64", "affine4_32"):
        k = (32, 96, 160) if form.endswith("32") else (64, 192, 320)
        shapes = [(f"rows_{rows}", (rows, 256), 70, Draw.normal) for rows in (1, 2, 3, 5, 8, 9)]
        shapes += [(f"k_{n}", (5, n), 40, Draw.normal) for n in k]
        shapes += [
            ("huge", (3, 192), 70, _huge),
            ("outliers", (3, 192), 70, Draw.outliers),
            ("row_slices", (2, 3, 192), 50, LAYOUTS["row_slices"]),
            ("last_stride_2", (2, 3, 192), 50, LAYOUTS["last_stride_2"]),
        ]
        found += [
            _linear_case(f"{form}_int8_{name}", form, shape, n, draw=draw, activations="int8")
            for name, shape, n, draw in shapes
        ]
    return found


def _huge(d: Draw, *shape: int) -> Tensor:
    # float16 must hold sums of them.
    return d.uniform(*shape, scale=1e4 if d.dtype == torch.float16 else 3e5)


def _other_scales() -> list[Case]:
    """Scales and biases in another dtype than the activations."""
    found = []
    for form in ("affine8_64", "affine4_32"):
        for scales in ALL:
            name = f"{form}_scales_{str(scales).removeprefix('torch.')}"
            dtypes = tuple(t for t in ALL if t != scales)
            found += [
                _linear_case(
                    f"{name}_rows_{rows}",
                    form,
                    (rows, 192),
                    40,
                    draw_weight=lambda d, f=form, s=scales: weight(d, f, 40, 192, s),
                    dtypes=dtypes,
                )
                for rows in (3, 9)
            ]
    return found


def _layer_shapes() -> list[Case]:
    """The widths of the real layers, and a few of their rows."""
    found = []
    for name, config in models().items():
        for layer in (0, -1):
            heads = config.num_query_heads[layer] * config.head_dim
            for k in {config.model_dim, heads, config.ffn_dims[layer]}:
                for form in ("plain", "affine4_64", "packed12"):
                    case = f"{name}_{form}_layer_{layer % config.num_transformer_layers}_k_{k}"
                    found.append(_linear_case(case, form, (2, k), 24))
    return found


def _bench_plain(model: str, rows: tuple[int, ...]) -> list[Case]:
    """proj_2 of the last layer: 33 MB of bfloat16 in 1.1B, which some caches hold between two
    calls. Up to 512 rows; more are torch's product alone.
    """
    config = models()[model]
    k, n = config.ffn_dims[-1], config.model_dim

    def case(form: str, count: int, n: int, check: Case | None) -> Case:
        return _linear_case(f"{model}_{form}_rows_{count}", form, (count, k), n, check=check)

    return [
        case(form, count, n, case(form, count, 128, None))
        for form in ("plain", "affine8_64", "affine4_64", "packed12")
        for count in rows
        if count <= 512
    ]


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    return _bench_plain(model, rows) + bench_fused(model, rows)


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    """Of a compressed weight the product with the dense one, kept."""
    x, weight = args
    dense = weight if isinstance(weight, Tensor) else reference.dense(weight, x.dtype)
    if not kwargs:
        return {"eager": lambda x, weight: F.linear(x, dense)}

    def linear(x, weight, norm=None, eps=1e-6, swiglu=False, residual=None, activations=None):
        y = F.linear(x if norm is None else F.rms_norm(x, norm.shape, norm, eps), dense)
        if swiglu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if residual is None else residual + y

    return {"eager": linear}


def least_bytes(args: tuple, kwargs: dict, outputs: tuple[Tensor, ...], backward: bool) -> int:
    """The weight as it is stored; of keyword arguments the tensors."""
    around = [t for t in kwargs.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in (*args, *around, *outputs))


def operations(args: tuple, kwargs: dict, backward: bool) -> int:
    return of_linear(*args)


def _of_exact_weight(
    x: Tensor, w: Tensor, norm: Tensor | None, eps: float, swiglu: bool, residual: Tensor | None
) -> Tensor:
    """The reference with a weight in float32, each result rounded to x's dtype as ever."""
    if norm is not None:
        x = reference.rms_norm(x, norm, eps)
    y = F.linear(x.float(), w).to(x.dtype)
    if swiglu:
        y = reference.swiglu(y)
    return y if residual is None else residual + y


def reordered(
    orders: Orders, x: Tensor, weight: Weight, norm: Tensor | None = None, eps: float = 1e-6,
    swiglu: bool = False, residual: Tensor | None = None, activations: str | None = None,
) -> Tensor:  # fmt: skip
    """Columns of x and the weight, which the product and the norm sum; rows of x, which the
    weight's gradient sums, and of the weight, which that of x does. Rows that are rounded to 8
    bits are rounded in their own order."""
    if activations is not None:
        x = reference.int8_rows(x if norm is None else reference.rms_norm(x, norm, eps))
        norm = None
    # A compressed weight is rounded on its way into a dense product, and isn't in one that reads it
    # as it is stored: both are right, and of few results one may be right by luck.
    exact = not isinstance(weight, Tensor) and x.dtype.itemsize < 4 and orders.coin()
    w = reference.dense(weight, torch.float32 if exact else x.dtype)
    rows, columns = orders(math.prod(x.shape[:-1])), orders(x.shape[-1])
    outputs = orders.pairs(len(w)) if swiglu else orders(len(w))
    n = len(w) // 2 if swiglu else len(w)
    y = (_of_exact_weight if exact else reference.linear)(
        take(flat_rows(x), rows, columns),
        take(w, outputs, columns),
        None if norm is None else take(norm, columns),
        eps,
        swiglu,
        None if residual is None else take(flat_rows(residual), rows, outputs[:n]),
    )
    return put_back(y, rows, outputs[:n]).view(*x.shape[:-1], n)


SPEC = OpSpec(
    "linear",
    outputs=("y",),
    cases=_plain_cases() + fused_cases(),
    bench_cases=bench_cases,
    backward=False,  # torch's own products
    baselines=baselines,
    least_bytes=least_bytes,
    operations=operations,
    reordered=reordered,
)
