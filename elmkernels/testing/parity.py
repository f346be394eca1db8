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

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import BACKENDS, REFERENCE, implements
from ..weights.formats import Arena
from .cases import CASES, OPS
from .cases.attention import SPEC as ATTENTION
from .cases.draw import Case, make

EPS32 = torch.finfo(torch.float32).eps
SLACK = 4.0
ATTENTION_SLACK = SLACK * ATTENTION.slack  # also of whole models, whose layers attend
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ParityError(AssertionError):
    """A candidate that doesn't compute what its reference computes."""


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
    """Hold a candidate to the rule above. truth is float64; the yardstick is the reference's
    result in the working dtype, which is the dtype that the candidate must have.
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


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN before a kernel gets it: what it forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Only the filling is wanted: an operation of torch without a deterministic form may run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def specification(op: str) -> Callable:
    """The reference of an op under the op's public signature, with what it writes in place."""
    spec = OPS[op]
    return spec.observe(spec.adapt(getattr(reference, op)))


def _widen(x: Any, dtype: torch.dtype | None) -> Any:
    """A fresh leaf with x's data, layout and need of a gradient; floats in `dtype` if given.
    Weights in forms of their own and decoders of them are read only, in the dtype that they have.
    """
    if isinstance(x, Arena):
        return x._replace(data=_widen(x.data, dtype))
    if not isinstance(x, Tensor):
        return x
    copy = x.detach()
    if x.is_floating_point():
        copy = copy.to(dtype) if dtype else copy
        # Caches are written: each run needs its own. Leaves are read: they keep their layout.
        copy = copy if x.requires_grad else copy.clone()
    return copy.requires_grad_(x.requires_grad)


def _cotangents(case: Case, outputs: Sequence[Tensor], seed: int) -> list[Tensor | None]:
    """The gradients that arrive at the outputs, random, laid out as the case says."""
    found: list[Tensor | None] = []
    for i, out in enumerate(outputs):
        generator = torch.Generator(out.device).manual_seed(seed + 1 + i)
        shape = list(out.shape)
        if case.cotangent == "broadcast":
            shape[:-1] = [1] * (len(shape) - 1)
        elif case.cotangent == "strided":
            shape[-1] *= 2
        dy = torch.randn(shape, generator=generator, device=out.device).to(out.dtype)
        if case.cotangent == "strided":
            dy = dy[..., ::2]
        found.append(None if i in case.unused else dy.expand(out.shape))
    return found


def _tuple(x: Tensor | tuple) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def _run(
    fn: Callable, case: Case, inputs: tuple[tuple, dict], dtype: torch.dtype | None, seed: int,
    like: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """{"y": ..., "grad x": ...}: a function's outputs and gradients on (widened) inputs. The
    cotangents are drawn for the outputs `like`, so that every run gets the same ones."""
    args = tuple(_widen(a, dtype) for a in inputs[0])
    kwargs = {key: _widen(value, dtype) for key, value in inputs[1].items()}
    outputs = _tuple(fn(*args, **kwargs))
    names = OPS[case.op].outputs
    found = {name: out.detach() for name, out in zip(names, outputs, strict=True)}
    parameters = list(inspect.signature(getattr(ops, case.op)).parameters)
    named = dict(zip(parameters, args, strict=False)) | kwargs
    leaves = {name: a for name, a in named.items() if _needs_grad(a)}
    pairs = [
        (out, dy.to(out.dtype))
        for out, dy in zip(outputs, _cotangents(case, like or outputs, seed), strict=True)
        if dy is not None and out.requires_grad
    ]
    if pairs and leaves:
        reached, arriving = zip(*pairs, strict=True)
        grads = torch.autograd.grad(reached, [*leaves.values()], arriving, allow_unused=True)
        for (name, leaf), g in zip(leaves.items(), grads, strict=True):
            # A leaf that no used output depends on: None and zeros say the same.
            found[f"grad {name}"] = torch.zeros_like(leaf) if g is None else g
    return found


def _needs_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def runnable(op: str, device: torch.device | str = "cpu") -> list[str]:
    """The backends, besides the reference, that can run an op on a device here."""
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
    """Run a case on a backend (None: the one the op prefers) and hold all it gives to truth."""
    inputs = make(case, dtype, device, seed)
    spec = specification(op)
    outputs = _tuple(spec(*_detached(inputs)[0], **_detached(inputs)[1]))
    truth = _run(spec, case, inputs, torch.float64, seed, like=outputs)
    yardstick = _run(spec, case, inputs, None, seed, like=outputs)

    fn = OPS[op].observe(getattr(ops, op))

    def candidate(*args, **kwargs):
        return fn(*args, backend=backend, **kwargs)

    with poisoned():
        got = _run(candidate, case, inputs, None, seed, like=outputs)
    slack = SLACK * OPS[op].slack
    comparisons = [compare(truth[k], yardstick[k], got[k], k, slack) for k in truth]
    name = str(dtype).removeprefix("torch.")
    return Record(op, case.name, name, backend or "preferred", str(device), comparisons)


def _detached(inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    def strip(x: Any) -> Any:
        if isinstance(x, Arena):
            return x._replace(data=x.data.clone())
        return x.detach().clone() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(strip(a) for a in inputs[0]), {k: strip(v) for k, v in inputs[1].items()}


def assert_parity(
    op: str,
    case: Case,
    dtype: torch.dtype,
    backend: str | None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Record:
    """check_parity, raising ParityError that names the tensor, its error and what is allowed."""
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
    """Every case of the named ops (None: all) in every dtype on every backend that can run here
    (None) or is named. `progress` is called with each record as it comes.
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
