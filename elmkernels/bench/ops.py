"""Ops beside their baselines: time, bandwidth, share of this machine's ceiling, parity.

Every figure comes with its baselines' from the same run, and with a copy that moves the same bytes:
`copy` in a record is the op's time if memory were all that it cost.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..checks import one_line
from ..testing.cases import BENCH_ROWS, OPS, bench_cases
from ..testing.cases.draw import Case, make
from ..testing.parity import DTYPES, check_parity, plan
from .baselines.of_ops import baselines
from .timing import Timing, copies_beyond_cache, copies_of, interleave, keep_pages

QUICK_ROWS = (1, 512)


@dataclass(frozen=True)
class BenchRecord:
    """One op, case, dtype and backend, forward or forward + backward, beside its baselines.

    Times are seconds: of the work itself (a GPU's from graphs over rotated buffers). `calls` are
    those of eager calls, host included, measured on a GPU only: on a CPU they are the same.
    """

    op: str
    case: str
    dtype: str
    backend: str
    device: str
    backward: bool
    time: Timing
    baselines: dict[str, Timing]
    copy: Timing
    nbytes: int
    flops: int | None
    parity: bool
    missing: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Timing] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes a second, counting each that must move once."""
        return self.nbytes / self.time.median

    @property
    def of_copy(self) -> float:
        """The share of the bandwidth that a plain copy of as many bytes reached in this run."""
        return self.copy.median / self.time.median

    def speedup(self, baseline: str) -> float:
        return self.baselines[baseline].median / self.time.median

    def row(self) -> dict[str, Any]:
        """The record as one line of a table; the figures at baselines are how often faster we
        are.
        """
        line = {
            "op": self.op + (" fwd+bwd" if self.backward else ""),
            "case": self.case,
            "dtype": self.dtype,
            "backend": self.backend,
            "us": self.time.median * 1e6,
            "p20": self.time.p20 * 1e6,
            "p80": self.time.p80 * 1e6,
            "GB/s": self.bandwidth / 1e9,
            "of copy": self.of_copy,
            "TFLOP/s": self.flops / self.time.median / 1e12 if self.flops else None,
        }
        for name in self.baselines:
            line[f"x {name}"] = self.speedup(name)
        if self.calls:
            line["call us"] = self.calls[self.backend].median * 1e6
        return line | {"parity": "ok" if self.parity else "FAILED"}

    def json(self) -> dict[str, Any]:
        """Everything measured, for a file."""
        return asdict(self)


def passes(op: str) -> tuple[bool, ...]:
    """Forward, and forward + backward where the op has kernels for it."""
    return (False, True) if OPS[op].backward else (False,)


def closure(fn: Callable, args: tuple, kwargs: dict, backward: bool) -> Callable[[], object]:
    """One call of fn, or one call and its backward with cotangents that are not all alike."""
    if not backward:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)

        def forward() -> object:
            with torch.no_grad():
                return fn(*args, **kwargs)

        return forward
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outputs = fn(*args, **kwargs)
    cotangents = [torch.randn_like(o) for o in _tuple(outputs)]

    def step() -> object:
        return torch.autograd.grad(_tuple(fn(*args, **kwargs)), leaves, cotangents)

    return step


def _tuple(x: Tensor | tuple) -> tuple:
    return x if isinstance(x, tuple) else (x,)


@functools.cache
def _parity(op: str, case: Case, dtype: torch.dtype, backend: str, device: str) -> bool:
    return check_parity(op, case.check or case, dtype, backend, device).ok


def bench_op(
    op: str,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    backward: bool = False,
    device: torch.device | str = "cpu",
    *,
    compiled: bool = True,
    cold: bool | None = None,
    min_time: float = 0.2,
    rounds: int = 9,
) -> BenchRecord:
    """Measure one backend on one case beside all baselines. cold: rotate as many buffers as leave
    the
    data out of the caches, on a GPU by default; otherwise data is where the last call left it.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_pages()
    cold = device.type == "cuda" if cold is None else cold
    args, kwargs = make(case, dtype, device)

    def ours(*args, **kwargs):
        return getattr(ops, op)(*args, backend=backend, **kwargs)

    spec, outputs = OPS[op], tuple(o.detach() for o in _tuple(ours(*args, **kwargs)))
    nbytes = spec.least_bytes(args, kwargs, outputs, backward)
    copies = copies_beyond_cache(nbytes, device) if cold else 1
    inputs = [(args, kwargs), *(make(case, dtype, device, seed) for seed in range(1, copies))]
    measured: dict[str, list[Callable]] = {}
    missing = {}
    if compiled:
        torch.compiler.reset()  # each case is compiled for its own shapes
    functions = {backend: ours, **baselines(op, args, kwargs, device, compiled)}
    for name, fn in functions.items():
        try:
            closures = [closure(fn, *each, backward) for each in inputs]
            closures[0]()
        except RuntimeError as error:
            if name == backend:
                raise
            missing[name] = one_line(error)
        else:
            measured[name] = closures
    measured["copy"] = copies_of(nbytes, device, copies)
    options = {"device": device, "min_time": min_time, "rounds": rounds}
    times = interleave(measured, replay=device.type == "cuda", **options)
    calls = interleave(measured, **options) if device.type == "cuda" else {}
    time, copy = times.pop(backend), times.pop("copy")
    return BenchRecord(
        op,
        case.name,
        str(dtype).removeprefix("torch."),
        backend,
        str(device),
        backward,
        time,
        times,
        copy,
        nbytes,
        spec.operations(args, kwargs, backward) if spec.operations else None,
        _parity(op, case, dtype, backend, str(device)),
        missing,
        calls,
    )


def run_bench(
    op_names: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype | str] = (torch.float32, torch.bfloat16),
    backends: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    quick: bool = False,
    progress: Callable[[BenchRecord], None] | None = None,
    rows: Sequence[int] | None = None,
    model: str = "1_1B",
) -> list[BenchRecord]:
    """Time every op, forward and forward + backward, beside its baselines.

    Args:
        op_names: the ops; None for all.
        dtypes: or their names.
        backends: their names; None for all that can run here.
        device: where.
        quick: two row counts, shorter, and without torch.compile, whose figure is then absent.
        progress: called with each record as it comes.
        rows: how many tokens at once; None for those of `quick` or all.
        model: whose layers: "270M", "450M", "1_1B" or "3B".

    Returns:
        A BenchRecord for each op, backend, case, dtype and pass; times are in seconds.

    Raises:
        ValueError: there is no op of that name.
        RuntimeError: a named backend can run none of the ops here.

    Example:
        >>> options = {"quick": True, "rows": [1], "model": "270M"}
        >>> records = run_bench(["swiglu"], ["float32"], ["reference"], **options)
    """
    records = []
    dtypes = [DTYPES[d] if isinstance(d, str) else d for d in dtypes]
    rows = rows or (QUICK_ROWS if quick else BENCH_ROWS)
    options = {"min_time": 0.05, "rounds": 5, "compiled": False} if quick else {}
    for op, backend in plan(op_names, backends, device):
        for case in bench_cases(op, tuple(rows), model):
            taken = [d for d in dtypes if d in case.dtypes]
            for dtype, backward in itertools.product(taken, passes(op)):
                record = bench_op(op, case, dtype, backend, backward, device, **options)
                records.append(record)
                if progress is not None:
                    progress(record)
    return records
