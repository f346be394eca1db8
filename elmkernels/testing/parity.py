"""Whether a kernel computes what its reference computes. All tolerance of the project is here.

Truth is the reference in float64 on the same, already rounded inputs. The yardstick is the error
that the reference itself makes in the working dtype. A candidate's output or gradient passes when
it is finite, has truth's shape and the working dtype, and

    max error <= 2 x yardstick's max error + 1 ulp, in that dtype, of the largest truth + slack
    rms error <= 1.5 x yardstick's rms error + slack

where slack is 4 eps32 of the largest truth or of truth's rms, which only float32 can feel: another
order of a sum, another exp. The rms rule catches what the max rule lets through, as a store that
truncates instead of rounding. A yardstick of few elements may be small by luck: of n elements it
counts 1 + 8/n times.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import BACKENDS, REFERENCE, implements
from .cases import CASES, OPS
from .cases.attention import SPEC as ATTENTION
from .cases.draw import Case, make
from .evaluation import as_tuple, detached, evaluate, poisoned, specification

EPS32 = torch.finfo(torch.float32).eps
SLACK = 4.0
ATTENTION_SLACK = SLACK * ATTENTION.slack  # also of whole models, whose layers attend
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ParityError(AssertionError):
    """A candidate doesn't compute what its reference computes; the message says by how much.

    Example:
        >>> raise ParityError("swiglu is not its reference")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ParityError
    """


@dataclass(frozen=True)
class Comparison:
    """One tensor of a candidate beside truth: errors, what is allowed, and why it fails if so."""

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


@dataclass(frozen=True)
class Record:
    """The verdict on one backend, op, case and dtype."""

    op: str
    case: str
    dtype: str
    backend: str
    device: str
    comparisons: list[Comparison] = field(repr=False)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons)

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda c: (not c.ok, c.used))

    def row(self) -> dict[str, Any]:
        """The record as one line of a table."""
        worst = self.worst
        return {
            "op": self.op,
            "case": self.case,
            "dtype": self.dtype,
            "backend": self.backend,
            "worst": worst.what,
            "max error": worst.max_error,
            "allowed": worst.max_allowed,
            "rms error": worst.rms_error,
            "rms allowed": worst.rms_allowed,
            "rms / reference": worst.ratio,
            "parity": "ok" if self.ok else f"FAILED: {worst.reason}",
        }


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


def compare(
    truth: Tensor,
    yardstick: Tensor,
    candidate: Tensor,
    what: str = "value",
    slack: float = SLACK,
) -> Comparison:
    """Hold one tensor of a candidate to the rule of this module.

    Args:
        truth: float64, finite.
        yardstick: the reference's result in the working dtype, which the candidate must have.
        candidate: what is judged.
        what: its name, for the verdict.
        slack: units of eps32 of the largest truth that are allowed besides.

    Returns:
        A Comparison: errors, what is allowed, and the reason if it fails.

    Raises:
        ValueError: truth or yardstick isn't finite.

    Example:
        >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> compare(truth, truth.float(), truth.float() + 1).ok
        False
    """
    wide = truth.detach().double()
    if not bool(wide.isfinite().all()) or not bool(yardstick.isfinite().all()):
        raise ValueError(f"{what} must be finite in truth and in the yardstick, got inf or nan")
    truth_max, truth_rms = _magnitudes(wide)
    yardstick_max, yardstick_rms = _magnitudes(yardstick.detach().double() - wide)
    luck = 1 + 8 / max(1, truth.numel())
    max_allowed = 2 * luck * yardstick_max + ulp(truth_max, yardstick.dtype)
    max_allowed += slack * EPS32 * truth_max
    rms_allowed = 1.5 * luck * yardstick_rms + SLACK * EPS32 * truth_rms
    max_error = rms_error = math.inf
    reason = None
    if candidate.shape != truth.shape:
        reason = f"shape must be {list(truth.shape)}, got {list(candidate.shape)}"
    elif candidate.dtype != yardstick.dtype:
        reason = f"dtype must be {yardstick.dtype}, got {candidate.dtype}"
    elif not bool(candidate.isfinite().all()):
        bad = int((~candidate.isfinite()).sum())
        reason = f"{bad} of {candidate.numel()} elements are not finite"
    else:
        max_error, rms_error = _magnitudes(candidate.detach().to(wide.device).double() - wide)
        if max_error > max_allowed:
            reason = f"max error must be at most {max_allowed:.3g}, got {max_error:.3g}"
        elif rms_error > rms_allowed:
            reason = f"rms error must be at most {rms_allowed:.3g}, got {rms_error:.3g}"
    return Comparison(
        what, max_error, max_allowed, rms_error, rms_allowed,
        yardstick_max, yardstick_rms, truth_max, truth_rms, reason,
    )  # fmt: skip


def runnable(op: str, device: torch.device | str = "cpu") -> list[str]:
    """Which backends, besides the reference, can run an op here.

    Args:
        op: its name.
        device: where.

    Returns:
        Their names.

    Example:
        >>> "reference" in runnable("swiglu")
        False
    """
    kind = torch.device(device).type
    return [
        b.name
        for b in BACKENDS.values()
        if b.name != REFERENCE and b.missing is None and kind in b.devices
        and implements(b.name, op)
    ]  # fmt: skip


def plan(
    op_names: Iterable[str] | None, backends: Iterable[str] | None, device: torch.device | str
) -> list[tuple[str, str]]:
    """(op, backend) pairs to run: the named ops (None: all) on every backend that can run here
    (None) or on those named that have the op. Raises for a name that no op can take here.
    """
    op_names = list(CASES if op_names is None else op_names)
    for op in op_names:
        if op not in CASES:
            raise ValueError(f"op must be one of {', '.join(CASES)}, got {op!r}")
    able = {op: runnable(op, device) for op in op_names}
    if backends is None:
        return [(op, backend) for op in op_names for backend in able[op]]
    backends = list(backends)
    for name in backends:
        if name != REFERENCE and not any(name in names for names in able.values()):
            reason = BACKENDS[name].missing if name in BACKENDS else "there is no such backend"
            what = f"backend {name!r} can't run {', '.join(op_names)} on {device} here"
            raise RuntimeError(f"{what}: {reason or 'it has no kernels for them on that device'}")
    return [(op, b) for op in op_names for b in backends if b == REFERENCE or b in able[op]]


def check_parity(
    op: str,
    case: Case,
    dtype: torch.dtype,
    backend: str | None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Record:
    """Run a case on a backend and hold all that it gives, gradients too, to truth.

    Args:
        op: its name.
        case: the inputs.
        dtype: the working dtype.
        backend: its name; None for the one that the op prefers.
        device: where.
        seed: of the inputs and of the gradients that arrive.

    Returns:
        A Record: `ok`, and a Comparison of each tensor.

    Example:
        >>> check_parity("swiglu", CASES["swiglu"][0], torch.float32, None).ok
        True
    """
    inputs = make(case, dtype, device, seed)
    spec = specification(op)
    outputs = as_tuple(spec(*detached(inputs)[0], **detached(inputs)[1]))
    truth = evaluate(spec, case, inputs, torch.float64, seed, like=outputs)
    yardstick = evaluate(spec, case, inputs, None, seed, like=outputs)

    fn = OPS[op].observe(getattr(ops, op))

    def candidate(*args, **kwargs):
        return fn(*args, backend=backend, **kwargs)

    with poisoned():
        got = evaluate(candidate, case, inputs, None, seed, like=outputs)
    slack = SLACK * OPS[op].slack
    comparisons = [compare(truth[k], yardstick[k], got[k], k, slack) for k in truth]
    name = str(dtype).removeprefix("torch.")
    return Record(op, case.name, name, backend or "preferred", str(device), comparisons)


def assert_parity(
    op: str,
    case: Case,
    dtype: torch.dtype,
    backend: str | None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Record:
    """`check_parity` that raises.

    Args:
        op, case, dtype, backend, device, seed: as `check_parity` takes them.

    Returns:
        The Record.

    Raises:
        ParityError: a tensor isn't what it should be; it names the error and what is allowed.

    Example:
        >>> record = assert_parity("swiglu", CASES["swiglu"][0], torch.float32, None)
    """
    record = check_parity(op, case, dtype, backend, device, seed)
    failures = [f"  {c.what}: {c.reason}" for c in record.comparisons if not c.ok]
    if failures:
        head = f"{op} by {record.backend} on {case.name} in {record.dtype} is not its reference:"
        raise ParityError("\n".join([head, *failures]))
    return record


def run_parity(
    op_names: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype | str] = tuple(DTYPES.values()),
    backends: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Record], None] | None = None,
) -> list[Record]:
    """`check_parity` of every case in every dtype on every backend.

    Args:
        op_names: the ops; None for all.
        dtypes: or their names.
        backends: their names; None for all that can run here.
        device: where.
        progress: called with each Record as it comes.

    Returns:
        The Records.

    Raises:
        ValueError: there is no op of that name.
        RuntimeError: a named backend can run none of the ops here.

    Example:
        >>> records = run_parity(["swiglu"], ["float32"], ["reference"])
        >>> all(record.ok for record in records)
        True
    """
    records = []
    dtypes = [DTYPES[d] if isinstance(d, str) else d for d in dtypes]
    for op, backend in plan(op_names, backends, device):
        for case in CASES[op]:
            for dtype in dtypes:
                if dtype not in case.dtypes:
                    continue
                record = check_parity(op, case, dtype, backend, device)
                records.append(record)
                if progress is not None:
                    progress(record)
    return records
