"""The one way an op is measured: each bench_<op>.py names it in OP and calls `measure`."""

from collections.abc import Callable

import pytest
import torch

from elmkernels import ops
from elmkernels.bench.ops import bench_op, closure, format_table, passes
from elmkernels.testing import bench_cases, make, runnable
from elmkernels.testing.cases.ops import BENCH_ROWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = pytest.StashKey[list]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--size") == "full"
    cases = bench_cases(metafunc.module.OP, BENCH_ROWS if full else (8,))
    dtypes = (torch.float32, torch.bfloat16)
    pairs = [(case, dtype) for case in cases for dtype in dtypes if dtype in case.dtypes]
    metafunc.parametrize(("case", "dtype"), pairs, ids=str)
    metafunc.parametrize("backend", runnable(metafunc.module.OP, DEVICE) or ["reference"])
    backward = passes(metafunc.module.OP)
    metafunc.parametrize("backward", backward, ids=["forward", "step"][: len(backward)])


@pytest.fixture
def measure(benchmark, full: bool, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time an op beside its baselines, record both, and fail if what it computes is wrong."""

    def run(op, case, dtype, backend, backward) -> None:
        options = {} if full else {"compiled": False, "min_time": 0.01, "rounds": 3}
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
