"""What is known of `linear_cross_entropy`. Its cases: the widths of the four models, vocabularies
that are no multiple of anything, every option, and logits far from 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...ops._flops import of_losses
from ..equivalent import Orders, flat_rows, put_back, take, with_gradient
from .draw import ALL, HALF, LAYOUTS, Case, Draw, Inputs, grad, models
from .spec import OpSpec, installed, liger, total_bytes

VOCABULARY = 32000  # that of the benchmarks


def targets(d: Draw, *shape: int, vocabulary: int, ignored: float = 0.0, index: int = -100):
    """Random targets, a share of them `index`, the one to ignore."""
    found = torch.randint(vocabulary, shape, generator=d.generator, device=d.device)
    drawn = torch.rand(shape, generator=d.generator, device=d.device)
    return found.masked_fill(drawn < ignored, index)


def _case(
    name: str,
    shape: tuple[int, ...],
    vocabulary: int,
    *,
    draw: Callable[..., Tensor] = Draw.normal,
    scale: float = 2.0,
    offset: float = 0.0,
    wide: bool = False,
    ignored: float = 0.0,
    cotangent: str = "contiguous",
    dtypes: tuple[torch.dtype, ...] = ALL,
    check: Case | None = None,
    **options,
) -> Case:
    """shape: of hidden. scale: of the logits; offset: what all of them share. wide: a float32
    weight. ignored: the share of targets that are. options: the op's.
    """

    def build(d: Draw) -> Inputs:
        hidden = draw(d, *shape)
        w = d.normal(vocabulary, shape[-1], dtype=torch.float32)
        w *= scale * max(1, shape[-1]) ** -0.5
        if offset:
            hidden[..., 0] = 1.0
            w[:, 0] = offset
        w = w.to(torch.float32 if wide else d.dtype)
        index = options.get("ignore_index", -100)
        t = targets(d, *shape[:-1], vocabulary=vocabulary, ignored=ignored, index=index)
        return (grad(hidden), grad(w), t), dict(options)

    return Case("linear_cross_entropy", name, build, dtypes, cotangent=cotangent, check=check)


def cases() -> list[Case]:
    found = [
        _case(f"{name}_hidden", (2, 9, config.model_dim), 515) for name, config in models().items()
    ]
    every = {"z_loss": 1e-3, "label_smoothing": 0.1}
    for reduction in ("none", "sum", "mean"):
        found += [
            _case(f"{reduction}", (3, 7, 96), 1003, reduction=reduction),
            _case(f"{reduction}_every_option", (3, 7, 96), 1003, reduction=reduction, **every),
            _case(f"{reduction}_ignored", (3, 40, 64), 131, reduction=reduction, ignored=0.6),
            _case(f"{reduction}_few_ignored", (120, 64), 131, reduction=reduction, ignored=0.05),
            _case(f"{reduction}_no_rows", (0, 64), 131, reduction=reduction),
        ]
    found += [
        _case(f"vocabulary_{v}", (33, 40), v, reduction="none") for v in (2, 7, 17, 2048, 4099)
    ]
    huge = {"dtypes": ALL[:1], "reduction": "none"}
    return found + [
        _case("one_row", (1, 256), 300),
        _case("one_dimension", (256,), 300, reduction="none"),
        _case("width_1", (65, 1), 33),
        _case("many_rows", (1031, 16), 77, reduction="none"),
        _case("z_loss", (33, 64), 515, z_loss=0.01),
        _case("label_smoothing", (33, 64), 515, label_smoothing=0.2),
        _case("all_smoothing", (33, 64), 515, label_smoothing=1.0),
        _case("ignore_index_0", (120, 64), 131, ignore_index=0, ignored=0.3),
        _case("wide_weight", (3, 11, 96), 515, wide=True, dtypes=HALF),
        _case("wide_weight_losses", (33, 96), 515, wide=True, dtypes=HALF, reduction="none"),
        _case("logits_of_hundreds", (33, 64), 515, scale=100.0, reduction="none"),
        _case("logits_of_ten_thousand", (33, 64), 515, scale=5000.0, **huge),
        _case("huge_offset", (33, 64), 515, offset=8192.0, **huge),
        _case("huge_negative_offset", (33, 64), 515, offset=-8192.0, **huge, **every),
        _case("strided_dy", (33, 64), 131, cotangent="strided", reduction="none"),
        _case("broadcast_dy", (3, 11, 64), 131, cotangent="broadcast", reduction="none"),
        *(
            _case(name, (3, 5, 200), 131, draw=lambda d, *s, lay=lay: lay(d, *s), reduction="none")
            for name, lay in LAYOUTS.items()
            if name != "broadcast_rows"  # rows alike: no target could be told from another
        ),
    ]


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    """The mean loss of `rows` tokens over the whole vocabulary."""
    n = models()[model].model_dim
    small = _case(f"{model}_check", (64, n), 2003)
    return [_case(f"{model}_rows_{r}", (r, n), VOCABULARY, check=small) for r in rows]


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _of_rows(fn: Callable | None, **options) -> Callable | None:
    """A function of [rows, n] and [rows] under the op's signature."""
    if fn is None:
        return None
    return lambda hidden, weight, targets: fn(
        hidden.flatten(0, -2), weight, targets.flatten(), **options
    )


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    """torch's own is in chunks of its default size."""
    found: dict[str, Callable | None] = {"eager": _eager}
    if device.type == "cuda":
        found["liger"] = _of_rows(liger("liger_fused_linear_cross_entropy"))
        found["cce"] = installed("cut_cross_entropy", "linear_cross_entropy")
    if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):
        found["torch"] = _of_rows(F.linear_cross_entropy, options=options())
    return found


def least_bytes(args: tuple, kwargs: dict, outputs: tuple[Tensor, ...], backward: bool) -> int:
    written = total_bytes(*args[:2]) if backward else 0
    return total_bytes(*args, *outputs) + written


def operations(args: tuple, kwargs: dict, backward: bool) -> int:
    return of_losses(*args[:2], 3 if backward else 1)


def reordered(
    orders: Orders, hidden: Tensor, weight: Tensor, targets: Tensor, *,
    ignore_index: int = -100, reduction: str = "mean", **options,
) -> Tensor:  # fmt: skip
    """Columns, which a logit sums; the vocabulary, which the softmax does; rows, which the loss
    and the weight's gradient do. In half types gradients are made at another scale too, and scaled
    back: those of few rows round few numbers."""
    rows, columns = orders(targets.numel()), orders(hidden.shape[-1])
    vocabulary, nothing = orders(len(weight)), -100
    factor = orders.factor() if hidden.dtype.itemsize < 4 and orders.coin() else 1.0
    if factor != 1.0:
        hidden, weight = (with_gradient(x, x / factor) for x in (hidden, weight))
    drawn = take(targets.reshape(-1), rows)
    real = drawn != ignore_index
    moved = vocabulary.argsort()[drawn.where(real, 0)].where(real, nothing)
    losses = reference.linear_cross_entropy(
        take(flat_rows(hidden), rows, columns),
        take(weight, vocabulary, columns),
        moved,
        ignore_index=nothing,
        reduction=reduction,
        **options,
    )
    losses = losses if factor == 1.0 else with_gradient(losses, losses * factor)
    return put_back(losses, rows).view(targets.shape) if reduction == "none" else losses


SPEC = OpSpec(
    "linear_cross_entropy",
    outputs=("loss",),
    cases=cases(),
    bench_cases=bench_cases,
    baselines=baselines,
    least_bytes=least_bytes,
    operations=operations,
    reordered=reordered,
)
