"""What is known of `rms_norm`: its cases and its baselines."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..equivalent import Orders, flat_rows, put_back, take
from ._norms import norm_bench_cases, norm_cases
from .draw import Case
from .spec import OpSpec, liger


def bench_cases(model: str, rows: tuple[int, ...], layer: int) -> list[Case]:
    return norm_bench_cases("rms_norm", 1, model, rows)


def baselines(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    def rms_norm(x, weight, eps=1e-6):
        return F.rms_norm(x, weight.shape, weight, eps)

    found: dict[str, Callable | None] = {"eager": rms_norm}
    if device.type == "cuda" and (theirs := liger("liger_rms_norm")):
        found["liger"] = lambda x, w, eps=1e-6: theirs(x, w, eps, in_place=False)
    return found


def reordered(orders: Orders, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Columns, which the mean sums; rows, which the weight's gradient sums; another scale of x."""
    rows, columns = orders(math.prod(x.shape[:-1])), orders(x.shape[-1])
    scale = orders.scale(x.dtype)
    scaled = scale * take(flat_rows(x), rows, columns)
    y = reference.rms_norm(scaled, take(weight, columns), eps * scale**2)
    return put_back(y, rows, columns).view(x.shape)


SPEC = OpSpec(
    "rms_norm",
    outputs=("y",),
    cases=norm_cases("rms_norm", 1),
    bench_cases=bench_cases,
    baselines=baselines,
    reordered=reordered,
)
