"""How far inside the rule of parity kernels pass: the cases that come near to their limit.

A right kernel beside one evaluation of the reference may come near by that evaluation's luck; near
by the largest error of all of them it is a kernel that is less accurate than its reference.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .. import ops
from .cases import CASES, OPS
from .parity import EVALUATIONS, Expected, plan
from .rule import Comparison

CLOSE = 2 / 3  # of what is allowed: passed by less than a third


@dataclass(frozen=True)
class Margin:
    """A tensor of one case: its share of what one evaluation allows, and of what all allow."""

    case: str
    what: str
    by_one: float
    by_all: float


@dataclass(frozen=True)
class Margins:
    """One backend, op and dtype: how many cases, and each tensor that is close by one evaluation.

    Example:
        >>> Margins("swiglu", "float32", "avx2", 1, [Margin("width_7", "y", 0.9, 0.5)]).ok
        True
    """

    op: str
    dtype: str
    backend: str
    cases: int
    close: list[Margin] = field(repr=False)

    @property
    def ok(self) -> bool:
        return all(margin.by_all <= 1 for margin in self.close)

    def row(self) -> dict[str, Any]:
        """The record as one line of a table."""
        nearest = max(self.close, key=lambda margin: margin.by_all, default=None)
        return {
            "op": self.op,
            "dtype": self.dtype,
            "backend": self.backend,
            "cases": self.cases,
            "one fails": counted(self.close, lambda margin: margin.by_one > 1),
            "one is close": counted(self.close, lambda margin: CLOSE < margin.by_one <= 1),
            "all are close": counted(self.close, lambda margin: margin.by_all > CLOSE),
            "nearest": None if nearest is None else f"{nearest.case}: {nearest.what}",
            "share": None if nearest is None else nearest.by_all,
        }


def counted(margins: Iterable[Margin], chosen: Callable[[Margin], bool]) -> int:
    """In how many cases a tensor is one of those."""
    return len({margin.case for margin in margins if chosen(margin)})


def _share(found: list[Comparison]) -> float:
    """Of the largest errors that several evaluations allow."""
    allowed = max(c.max_allowed for c in found), max(c.rms_allowed for c in found)
    return max(found[0].max_error / allowed[0], found[0].rms_error / allowed[1])


def close_tensors(expected: Expected, candidate: Callable) -> list[Margin]:
    """The tensors of a candidate that one evaluation of the reference lets pass by less than a
    third of what it allows, or not at all.
    """
    got = expected.results(candidate)
    by_one = expected.judge(got, (0,))
    close = {c.what for c in by_one if not c.ok or c.used > CLOSE}
    if not close:
        return []
    each = [by_one, *(expected.judge(got, (i,)) for i in range(1, EVALUATIONS))]
    return [
        Margin(expected.case.name, first.what, first.used, _share([first, *others]))
        for first, *others in zip(*each, strict=True)
        if first.what in close
    ]


def run_margins(
    op_names: Iterable[str] | None,
    dtypes: Iterable[torch.dtype],
    backends: Iterable[str] | None,
    device: torch.device | str,
    keep: Callable[[Margins], None],
) -> None:
    """Every case of the ops on the backends; `keep` is called with each backend's record of an op
    in a dtype. The arguments are those of `run_parity`.
    """
    for op, backend in plan(op_names, backends, device):
        candidate = partial(OPS[op].observe(getattr(ops, op)), backend=backend)
        for dtype in dtypes:
            cases = [case for case in CASES[op] if dtype in case.dtypes]
            found = [close_tensors(Expected(op, case, dtype, device), candidate) for case in cases]
            margins = [margin for close in found for margin in close]
            name = str(dtype).removeprefix("torch.")
            keep(Margins(op, name, backend, len(cases), margins))
