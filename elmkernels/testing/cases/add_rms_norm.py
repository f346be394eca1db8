"""What is known of `add_rms_norm`: its cases and its baselines."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..equivalent import Orders, flat_rows, put_back, take
from ._norms import norm_bench_cases, norm_cases
from .draw import LAYOUTS, Case, Draw, Inputs, grad
from .spec import OpSpec, liger


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


def reordered(
    orders: Orders, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As `rms_norm`."""
    rows, columns = orders(math.prod(x.shape[:-1])), orders(x.shape[-1])
    both = (take(flat_rows(t), rows, columns) for t in (x, residual))
    found = reference.add_rms_norm(*both, take(weight, columns), eps)
    normed, total = (put_back(t, rows, columns).view(x.shape) for t in found)
    return normed, total


SPEC = OpSpec(
    "add_rms_norm",
    outputs=("normed", "sum"),
    cases=cases(),
    bench_cases=bench_cases,
    baselines=baselines,
    reordered=reordered,
)
