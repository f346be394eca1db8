"""What the cases of `rms_norm` and `add_rms_norm` share: rows of every width and layout."""

from collections.abc import Callable

import torch
from torch import Tensor

from .draw import HALF, LAYOUTS, Case, Draw, Inputs, grad, models
from .spec import checked

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
    # Enough for several programs that each add to the weight's gradient, of the models' widths.
    "parts_of_1280": (67, 1280),
    "parts_of_3072": (45, 3072),
    "many_short_rows": (2051, 24),
}


def norm_cases(op: str, inputs: int) -> list[Case]:
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


def norm_bench_cases(op: str, inputs: int, model: str, rows: tuple[int, ...]) -> list[Case]:
    """The hidden numbers of a model, which are as wide in every layer."""
    n = models()[model].model_dim

    def case(count: int) -> Case:
        def build(d: Draw) -> Inputs:
            return (*(grad(d.normal(count, n)) for _ in range(inputs)), d.weight(n)), {}

        return Case(op, f"{model}_rows_{count}", build)

    return checked(case, rows)
