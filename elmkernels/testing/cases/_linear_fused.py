"""Inputs to `linear` with what comes before and after: a norm, SwiGLU, a residual."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .draw import HALF, LAYOUTS, Case, Draw, Inputs, grad, models
from .weights import FORMS, dtypes_of, weight


def _case(
    name: str,
    form: str,
    shape: tuple[int, ...],
    n: int,
    *,
    norm: bool = False,
    wide: bool = False,
    swiglu: bool = False,
    residual: bool = False,
    eps: float | None = None,
    draw: Callable[..., Tensor] = Draw.normal,
    draw_residual: Callable[..., Tensor] = Draw.normal,
    train: bool = False,
    **options,
) -> Case:
    """shape: of x. wide: a norm in float32. train: all that can requires a gradient."""

    def build(d: Draw) -> Inputs:
        x, w = draw(d, *shape), weight(d, form, n, shape[-1])
        kwargs: dict[str, Any] = {"swiglu": True} if swiglu else {}
        if norm or wide:
            kwargs["norm"] = d.weight(shape[-1], wide).detach()
        if eps is not None:
            kwargs["eps"] = eps
        if residual:
            kwargs["residual"] = draw_residual(d, *shape[:-1], n)
        if train:
            x, w = grad(x), grad(w) if isinstance(w, Tensor) else w
            kwargs |= {k: grad(v) for k, v in kwargs.items() if isinstance(v, Tensor)}
        return (x, w), kwargs

    return Case("linear", name, build, **({"dtypes": dtypes_of(form)} | options))


def fused_cases() -> list[Case]:
    """From 9 rows on, and for a gradient, it is done one after the other."""
    found = []
    for form in FORMS:
        for rows in (1, 2, 3, 5, 8, 9):
            shape = (rows, 192)
            found += [
                _case(f"{form}_norm_rows_{rows}", form, shape, 70, norm=True),
                _case(f"{form}_norm_swiglu_rows_{rows}", form, shape, 300, norm=True, swiglu=True),
                _case(f"{form}_residual_rows_{rows}", form, shape, 70, residual=True),
            ]
        everything = {"norm": True, "residual": True}
        found += [
            _case(f"{form}_swiglu", form, (3, 128), 250, swiglu=True),
            _case(f"{form}_norm_residual", form, (2, 3, 128), 33, **everything),
            _case(f"{form}_norm_residual_gradient", form, (6, 128), 70, train=True, **everything),
            _case(f"{form}_norm_swiglu_gradient", form, (6, 128), 150, norm=True, swiglu=True,
                  train=True),
            _case(f"{form}_norm_no_rows", form, (0, 128), 34, norm=True, swiglu=True),
            _case(f"{form}_norm_outliers", form, (4, 192), 70, norm=True, draw=Draw.outliers),
        ]  # fmt: skip
    for form in ("plain", "packed12"):
        for k in (1, 7, 33, 200):
            found.append(_case(f"{form}_norm_swiglu_k_{k}", form, (5, k), 80, norm=True,
                               swiglu=True))  # fmt: skip
    for layout in ("row_slices", "transposed", "last_stride_2", "broadcast_rows"):
        lay = LAYOUTS[layout]
        found += [
            _case(f"fused_{layout}", "plain", (2, 3, 192), 50, norm=True, swiglu=True, draw=lay),
            _case(f"residual_{layout}", "plain", (2, 3, 192), 50, residual=True, draw=lay,
                  draw_residual=lay),
        ]  # fmt: skip
    return found + [
        _case("norm_wide", "plain", (3, 192), 70, wide=True, dtypes=HALF),
        _case("norm_wide_swiglu", "affine4_64", (3, 192), 70, wide=True, swiglu=True, dtypes=HALF),
        _case("norm_eps_0.01", "plain", (6, 192), 70, norm=True, eps=0.01,
              draw=lambda d, *shape: d.normal(*shape, scale=0.1)),
        _case("norm_huge", "plain", (6, 192), 70, norm=True, swiglu=True, draw=Draw.huge),
        _case("swiglu_of_two_outputs", "plain", (8, 192), 2, norm=True, swiglu=True),
        _case("swiglu_no_outputs", "plain", (2, 64), 0, norm=True, swiglu=True),
        _case("residual_no_outputs", "plain", (2, 64), 0, residual=True),
        *_layer_shapes(),
    ]  # fmt: skip


def _layer_shapes() -> list[Case]:
    """The four products of the models' last layers, some of their outputs each. SwiGLU takes more:
    a few of its products are far larger than the rest, and their errors alone would be luck.
    """
    found = []
    for name, config in models().items():
        dim, ffn = config.model_dim, config.ffn_dims[-1]
        heads = config.num_query_heads[-1] * config.head_dim
        for form in ("plain", "affine8_64", "affine4_32", "packed12"):
            found += [
                _case(f"{name}_{form}_qkv", form, (2, dim), 24, norm=True),
                _case(f"{name}_{form}_out", form, (2, heads), 24, residual=True),
                _case(f"{name}_{form}_proj_1", form, (2, dim), 200, norm=True, swiglu=True),
                _case(f"{name}_{form}_proj_2", form, (2, ffn), 24, residual=True),
            ]
    return found


def bench_fused(model: str, rows: tuple[int, ...]) -> list[Case]:
    """The last layer's way into its feed-forward network, norm and SwiGLU included, and out of it,
    for few rows."""
    config = models()[model]
    dim, ffn = config.model_dim, config.ffn_dims[-1]

    def pair(form: str, count: int, width: int, check: bool) -> list[Case]:
        """width: of the outputs; the small ones are those whose parity stands for the rest."""
        into, out = (
            {"norm": True, "swiglu": True, "shape": (count, dim), "n": 2 * min(width, ffn)},
            {"residual": True, "shape": (count, ffn), "n": min(width, dim)},
        )
        small = pair(form, count, 128, False) if check else (None, None)
        return [
            _case(f"{model}_{form}_{what}_rows_{count}", form, check=each, **sizes)
            for what, sizes, each in zip(("norm_swiglu", "residual"), (into, out), small,
                                         strict=True)
        ]  # fmt: skip

    return [
        case
        for form in ("plain", "affine4_64", "packed12")
        for count in rows
        if 0 < count <= 8
        for case in pair(form, count, max(dim, ffn), True)
    ]
