"""What tests, benchmarks and the command line share: cases, parity (all tolerance) and timing."""

from .cases import CASES, Case, bench_cases, make
from .parity import ParityError, assert_parity, check_parity, compare, run_parity

__all__ = [
    "CASES",
    "Case",
    "ParityError",
    "assert_parity",
    "bench_cases",
    "check_parity",
    "compare",
    "make",
    "run_parity",
]
