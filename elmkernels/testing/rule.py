"""The rule of parity for one tensor. All tolerance of the project is here.

Truth is the reference in float64 on the same, already rounded inputs. The yardstick is the largest
error that the reference itself makes in the working dtype, over evaluations that are equally right
(`equivalent`): one evaluation alone may be right by luck, as the order of its sums has it. A
candidate's output or gradient passes when it is finite, has truth's shape and the working dtype,
and

    max error <= 2 x yardstick's max error + 1 ulp, in that dtype, of the largest truth + slack
    rms error <= 1.5 x yardstick's rms error + slack

where slack is 4 eps32 of the largest truth or of truth's rms, which only float32 can feel: another
order of a sum, another exp. The rms rule catches what the max rule lets through, as a store that
truncates instead of rounding. Of few elements all evaluations may be right by luck: of n elements
the yardstick counts 1 + 8/n times.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
SLACK = 4.0
# Attention's softmax amplifies the rounding of its scores, and torch orders even the reference's
# sums by shape and machine.
ATTENTION_SLACK = 16.0
FACTORS = (2.0, 1.5)  # times the yardstick's max and rms error


@dataclass(frozen=True)
class Comparison:
    """One tensor of a candidate beside truth: errors, what is allowed, and why it fails if so.

    evaluations: of the reference, of which the yardstick is the largest error. More are made until
    the candidate passes, as the yardstick can only grow.
    """

    what: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    yardstick_max: float
    yardstick_rms: float
    truth_max: float
    truth_rms: float
    reason: str | None = None
    evaluations: int = 1

    @property
    def ok(self) -> bool:
        return self.reason is None

    @property
    def used(self) -> float:
        """The larger share of what is allowed that the errors take: 1 is the limit."""
        pairs = (self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed)
        return max(_ratio(error, allowed) for error, allowed in pairs)

    @property
    def ratio(self) -> float:
        """The candidate's rms error by that of the reference in the same dtype."""
        return _ratio(self.rms_error, self.yardstick_rms)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf)


def _magnitudes(x: Tensor) -> tuple[float, float]:
    """Largest magnitude and root mean square; 0 of nothing."""
    if x.numel() == 0:
        return 0.0, 0.0
    return float(x.abs().max()), float(x.square().mean().sqrt())


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between the numbers of a dtype at a magnitude."""
    info = torch.finfo(dtype)
    if value < info.smallest_normal:
        return info.smallest_normal * info.eps
    return 2.0 ** math.floor(math.log2(value)) * info.eps


def _errors(x: Tensor, wide: Tensor) -> tuple[float, float]:
    return _magnitudes(x.detach().to(wide.device).double() - wide)


def relative_errors(truth: Tensor, yardstick: Tensor) -> tuple[float, float]:
    """A yardstick's max error by truth's largest magnitude, its rms error by truth's rms."""
    wide = truth.detach().double()
    (max_error, rms_error), (largest, rms) = _errors(yardstick, wide), _magnitudes(wide)
    return max_error / largest if largest else 0.0, rms_error / rms if rms else 0.0


def compare(
    truth: Tensor,
    yardstick: Tensor | Iterable[Tensor],
    candidate: Tensor,
    what: str = "value",
    slack: float = SLACK,
    factors: tuple[float, float] = FACTORS,
    floor: tuple[float, float] = (0.0, 0.0),
) -> Comparison:
    """Hold one tensor of a candidate to the rule of this module.

    Args:
        truth: wider than the working dtype.
        yardstick: the reference's result in the working dtype, which is the dtype that the
            candidate must have; or several that are equally right, of which as many are taken as
            the candidate needs to pass.
        candidate: what is judged.
        what: its name in the verdict.
        slack: in eps32 of the largest truth.
        factors: times the yardstick's max and rms error.
        floor: what the yardstick is never below, as `relative_errors` gives it.

    Returns:
        A Comparison: errors, what is allowed, and the reason if it fails.

    Raises:
        ValueError: truth or a yardstick is not finite, or there is no yardstick.

    Example:
        >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> compare(truth, truth.float(), truth.float() + 1).ok
        False
    """
    wide = truth.detach().double()
    scale, errors, largest = _magnitudes(wide), (math.inf, math.inf), (0.0, 0.0)
    found = unfit = None
    luck = 1 + 8 / max(1, truth.numel())
    for count, result in enumerate((yardstick,) if isinstance(yardstick, Tensor) else yardstick, 1):
        if not bool(wide.isfinite().all()) or not bool(result.isfinite().all()):
            raise ValueError(f"{what} must be finite in truth and in the yardstick, got inf or nan")
        if count == 1:
            unfit = _unfit(candidate, truth, result.dtype)
            errors = errors if unfit else _errors(candidate, wide)
        largest = tuple(map(max, largest, _errors(result, wide)))
        least = [share * size for share, size in zip(floor, scale, strict=True)]
        allowed = [
            factor * max(luck * own, low)
            for factor, own, low in zip(factors, largest, least, strict=True)
        ]
        allowed[0] += ulp(scale[0], result.dtype) + slack * EPS32 * scale[0]
        allowed[1] += SLACK * EPS32 * scale[1]
        found = Comparison(
            what, errors[0], allowed[0], errors[1], allowed[1],
            *map(max, largest, least), *scale, unfit or _too_far(errors, allowed), count,
        )  # fmt: skip
        if unfit or found.ok:
            break
    if found is None:
        raise ValueError(f"{what} must have a yardstick, got none")
    return found


def _unfit(candidate: Tensor, truth: Tensor, dtype: torch.dtype) -> str | None:
    """Why a candidate has no errors to measure."""
    if candidate.shape != truth.shape:
        return f"shape must be {list(truth.shape)}, got {list(candidate.shape)}"
    if candidate.dtype != dtype:
        return f"dtype must be {dtype}, got {candidate.dtype}"
    bad = int((~candidate.isfinite()).sum())
    return f"{bad} of {candidate.numel()} elements are not finite" if bad else None


def _too_far(errors: Sequence[float], allowed: Sequence[float]) -> str | None:
    for name, error, most in zip(("max", "rms"), errors, allowed, strict=True):
        if error > most:
            return f"{name} error must be at most {most:.3g}, got {error:.3g}"
    return None
