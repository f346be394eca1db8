"""What is known of `add_rms_norm`: its cases and its baselines."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..equivalent import Orders
from ._norms import norm_bench_cases, norm_cases
from .draw import LAYOUTS, Case, Draw, Inputs, grad
from .rms_norm import reordered as norm_reordered
from .spec import OpSpec, liger, total_bytes


def _mixed_layouts(d: Draw) -> Inputs:
    x = grad(LAYOUTS["row_slices"](d, 3, 5, 200))
    return (x, grad(LAYOUTS["transposed"](d, 3, 5, 200)), d.weight(200)), {}


def cases() -> list[Case]:
    def plain(d: Draw) -> Inputs:
        return (grad(d.normal(2, 9, 1280)), grad(d.normal(2, 9, 1280)), d.weight(1280)), {}

    return [
        *norm_cases("add_rms_norm", 2),
        Case("add_rms_norm", "mixed_layouts", _mixed_layouts),
        Case("add_rms_norm", "sum_unused", plain, unused=(1,)),
        Case("add_rms_norm", "normed_unused", plain, unused=(0,)),
    ]


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    return norm_bench_cases("add_rms_norm", 2, model, rows)


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    def add_rms_norm(x, residual, weight, eps=1e-6):
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    found: dict[str, Callable | None] = {"eager": add_rms_norm}
    if device.type == "cuda" and (theirs := liger("liger_fused_add_rms_norm")):
        found["liger"] = lambda x, r, w, eps=1e-6: theirs(x, r, w, eps)
    return found


def least_bytes(args: tuple, kwargs: dict, outputs: tuple[Tensor, ...], backward: bool) -> int:
    """The backward reads the sum, not what it is of, whose two gradients are one."""
    x, residual, weight = args
    forward = total_bytes(x, residual, weight, *outputs)
    return forward + total_bytes(*outputs, outputs[1], weight, x, weight) if backward else forward


def reordered(
    orders: Orders, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What `rms_norm` does with the sum."""
    total = x + residual
    return norm_reordered(orders, total, weight, eps), total


SPEC = OpSpec(
    "add_rms_norm",
    outputs=("normed", "sum"),
    cases=cases(),
    bench_cases=bench_cases,
    baselines=baselines,
    least_bytes=least_bytes,
    reordered=reordered,
)
