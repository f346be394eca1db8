"""How an op is measured: `measure` times it beside its baselines, and a table ends the session."""

from collections.abc import Callable

import pytest
import torch

from elmkernels import ops
from elmkernels.backends import REFERENCE
from elmkernels.bench.ops import bench_op, closure, passes
from elmkernels.bench.table import format_table
from elmkernels.testing import OPS, Case, bench_cases, make, runnable
from elmkernels.testing.cases import BENCH_ROWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = pytest.StashKey[list]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--size") == "full"
    rows, model = (BENCH_ROWS, "1_1B") if full else ((8,), "270M")
    runs = [
        pytest.param(
            op, case, dtype, backend, backward, id=name(op, case, dtype, backend, backward)
        )
        for op in OPS
        for backend in runnable(op, DEVICE) or [REFERENCE]
        for case in bench_cases(op, rows, model)
        for dtype in (torch.float32, torch.bfloat16)
        if dtype in case.dtypes
        for backward in passes(op)
    ]
    metafunc.parametrize(("op", "case", "dtype", "backend", "backward"), runs)


def name(op: str, case: Case, dtype: torch.dtype, backend: str, backward: bool) -> str:
    return f"{op}-{case}-{dtype}-{backend}-{'step' if backward else 'forward'}"


@pytest.fixture
def measure(benchmark, full: bool, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time an op beside its baselines, record both, and fail if what it computes is wrong."""

    def run(op, case, dtype, backend, backward) -> None:
        options = {} if full else {"compiled": False, "min_time": 0.0, "rounds": 1}
        record = bench_op(op, case, dtype, backend, backward, DEVICE, **options)
        benchmark.group = f"{op} {case} {record.dtype} {'step' if backward else 'forward'}"
        benchmark.extra_info.update(record.json(), row=record.row())
        request.config.stash.setdefault(TABLE, []).append(record.row())
        args, kwargs = make(case, dtype, DEVICE)

        def ours(*args, **kwargs):
            return getattr(ops, op)(*args, backend=backend, **kwargs)

        work = closure(ours, args, kwargs, backward)

        def call() -> None:
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        # pytest-benchmark's own figure is the eager call, host included.
        benchmark.pedantic(call, rounds=50 if full else 2, iterations=1, warmup_rounds=3)
        assert record.parity

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash.get(TABLE, [])
    if rows:
        terminalreporter.section("ops beside their baselines (x: how often faster)")
        terminalreporter.write_line(format_table(rows))
