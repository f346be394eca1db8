"""Whether a kernel computes what its reference computes, by the rule in `rule`: every op, case and
dtype on every backend that can run here.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import BACKENDS, REFERENCE, implements
from ..weights.formats import Arena
from .cases import CASES, OPS
from .cases.draw import Case, make
from .equivalent import reordered
from .rule import FACTORS, SLACK, Comparison, compare

EVALUATIONS = 8  # of the reference in the working dtype, at most
RULE = (
    f"max error <= {FACTORS[0]:g} x yardstick + 1 ulp, rms error <= {FACTORS[1]:g} x yardstick, "
    f"each + {SLACK:g} eps32 of truth (in the max error of some ops more); the yardstick is the "
    f"reference's largest error in {EVALUATIONS} equally right evaluations"
)
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

    def assert_ok(self) -> None:
        """Raise a ParityError that names each tensor that fails, its error and what is allowed."""
        failures = [f"  {c.what}: {c.reason}" for c in self.comparisons if not c.ok]
        if failures:
            head = f"{self.op} by {self.backend} on {self.case} in {self.dtype}"
            raise ParityError("\n".join([f"{head} is not its reference:", *failures]))

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


def specification(op: str, evaluation: int = 0) -> Callable:
    """The reference of an op under the op's public signature, with what it writes in place. Its
    evaluations from 1 on are those that are equally right: see `equivalent`.
    """
    spec = OPS[op]
    found = reordered(spec.reordered, evaluation) if evaluation else getattr(reference, op)
    return spec.observe(spec.adapt(found))


def _widen(x: Any, dtype: torch.dtype | None) -> Any:
    """A fresh leaf with x's data, layout and need of a gradient; floats in `dtype` if given.
    Weights in forms of their own and stacks of them are read only, in the dtype that they have.
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


def run_case(
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


class Expected:
    """What an op must give on a case: truth, and as many of the reference's equally right results
    in the working dtype as a candidate needs to pass. What is evaluated once is kept.

    Example:
        >>> expected = Expected("swiglu", CASES["swiglu"][0], torch.bfloat16)
        >>> all(c.ok for c in expected.compare(elmkernels.swiglu))
        True
    """

    def __init__(
        self, op: str, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu",
        seed: int = 0,
    ):  # fmt: skip
        self.op, self.case, self.seed = op, case, seed
        self.dtype, self.device = str(dtype).removeprefix("torch."), str(device)
        self.inputs = make(case, dtype, device, seed)
        args, kwargs = _detached(self.inputs)
        self.outputs = _tuple(specification(op)(*args, **kwargs))
        self.truth = self.run(specification(op), torch.float64)
        self.evaluated = [self.run(specification(op))]

    def run(self, fn: Callable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """{"y": ..., "grad x": ...}: what a function like the op gives, all floats in `dtype`."""
        return run_case(fn, self.case, self.inputs, dtype, self.seed, like=self.outputs)

    def evaluation(self, i: int) -> dict[str, Tensor]:
        """The reference's i-th result in the working dtype; 0 is the plain one."""
        while len(self.evaluated) <= i:
            order = self.seed * EVALUATIONS + len(self.evaluated)
            self.evaluated.append(self.run(specification(self.op, order)))
        return self.evaluated[i]

    def results(self, candidate: Callable) -> dict[str, Tensor]:
        """What a candidate that has the op's signature gives, in memory that was poisoned."""
        with poisoned():
            return self.run(candidate)

    def judge(
        self, got: dict[str, Tensor], evaluations: Sequence[int] = range(EVALUATIONS)
    ) -> list[Comparison]:
        """Hold results to truth, by these evaluations or as many of them as they need to pass."""
        slack = SLACK * OPS[self.op].slack
        return [
            compare(truth, (self.evaluation(i)[what] for i in evaluations), got[what], what, slack)
            for what, truth in self.truth.items()
        ]

    def compare(self, candidate: Callable) -> list[Comparison]:
        """Run a candidate that has the op's signature and hold all it gives to truth."""
        return self.judge(self.results(candidate))

    def record(self, backend: str | None) -> Record:
        """The verdict on a backend; None: the one that the op prefers."""
        fn = OPS[self.op].observe(getattr(ops, self.op))
        comparisons = self.compare(partial(fn, backend=backend))
        name = backend or "preferred"
        return Record(self.op, self.case.name, self.dtype, name, self.device, comparisons)


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
    return Expected(op, case, dtype, device, seed).record(backend)


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
    record.assert_ok()
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
