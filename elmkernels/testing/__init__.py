"""Is it right? Cases of every op, and parity: all tolerance of ops and of whole models."""

from .cases import CASES, OPS, bench_cases
from .cases.draw import Case, make
from .cases.spec import OpSpec
from .parity import ParityError, assert_parity, check_parity, compare, run_parity, runnable

__all__ = [
    "CASES",
    "OPS",
    "Case",
    "OpSpec",
    "ParityError",
    "assert_parity",
    "bench_cases",
    "check_parity",
    "compare",
    "make",
    "run_parity",
    "runnable",
]
