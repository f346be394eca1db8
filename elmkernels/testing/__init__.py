"""Is it right? Cases of every op, and parity: all tolerance of ops and of whole models."""

from .cases.draw import Case, make
from .cases.ops import CASES, bench_cases
from .parity import ParityError, assert_parity, check_parity, compare, run_parity, runnable

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
    "runnable",
]
