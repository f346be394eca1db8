"""What is known of `swiglu`: its cases and its baselines."""

from collections.abc import Callable

import torch
from torch import Tensor

from ... import reference
from ..equivalent import Orders
from .draw import LAYOUTS, Case, Draw, grad, models
from .spec import OpSpec, checked, liger


def cases() -> list[Case]:
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

    def tails(d: Draw) -> Tensor:
        # Gates whose silu is 0: a kernel that clamps its exponential gives them 1e-35 of the gate.
        x = d.normal(9, 1536)
        x[:, :700:7] = -6e4 if d.dtype == torch.float16 else -1e36
        return x

    return found + [
        case("huge", huge),
        case("tails", tails),
        case("large", lambda d: d.normal(531, 8192), dtypes=(torch.float32,)),
        case("large_half", lambda d: d.normal(1061, 8192), dtypes=(torch.bfloat16,)),
        case("tiny", lambda d: d.normal(9, 1536, scale=1e-3)),
        case("broadcast_dy", lambda d: d.normal(2, 9, 1536), cotangent="broadcast"),
        case("strided_dy", lambda d: d.normal(2, 9, 400), cotangent="strided"),
    ]


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    ffn = models()[model].ffn_dims[layer]
    return checked(
        lambda n: Case(
            "swiglu", f"{model}_rows_{n}", lambda d: ((grad(d.normal(n, 2 * ffn)),), {})
        ),
        rows,
    )


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    """torch has no operation for it: eager is the reference."""
    if device.type == "cuda" and (theirs := liger("liger_swiglu")):
        return {"liger": lambda gate_up: theirs(*gate_up.chunk(2, dim=-1))}
    return {}


def reordered(orders: Orders, gate_up: Tensor) -> Tensor:
    """Nothing is summed, but torch has two exps: one of many numbers, one of a single one, which
    it takes where they don't lie side by side."""
    return reference.swiglu(torch.stack((gate_up, gate_up), dim=-1)[..., 0])


SPEC = OpSpec(
    "swiglu",
    outputs=("y",),
    cases=cases(),
    bench_cases=bench_cases,
    baselines=baselines,
    reordered=reordered,
)
