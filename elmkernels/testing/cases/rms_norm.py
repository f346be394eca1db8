"""What is known of `rms_norm`: its cases and its baselines."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

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


SPEC = OpSpec(
    "rms_norm",
    outputs=("y",),
    cases=norm_cases("rms_norm", 1),
    bench_cases=bench_cases,
    baselines=baselines,
)
