"""What tests, benchmarks and the command line share: cases, parity (all tolerance) and timing."""

from ..bench.ops import BenchRecord, bench_op, format_table, run_bench
from ..bench.timing import (
    Timing,
    copy_bandwidth,
    fingerprint,
    interleave,
    matmul_ceiling,
    peak_memory,
)
from .cases.draw import Case, make
from .cases.ops import CASES, bench_cases
from .parity import ParityError, assert_parity, check_parity, compare, run_parity, runnable

__all__ = [
    "CASES",
    "BenchRecord",
    "Case",
    "ParityError",
    "Timing",
    "assert_parity",
    "bench_cases",
    "bench_op",
    "check_parity",
    "compare",
    "copy_bandwidth",
    "fingerprint",
    "format_table",
    "interleave",
    "make",
    "matmul_ceiling",
    "peak_memory",
    "run_bench",
    "run_parity",
    "runnable",
]
