"""Every op, forward and backward, on every backend that can run here, against its reference."""

from functools import lru_cache

import pytest
import torch

from elmkernels.backends import BACKENDS
from elmkernels.testing import CASES
from elmkernels.testing.cases.draw import models
from elmkernels.testing.cases.weights import FORMS
from elmkernels.testing.parity import Expected, runnable

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# A process that interprets Triton is there for Triton alone; others prove the compiled backends.
INTERPRETED = "cpu" in BACKENDS["triton"].devices


# What takes Triton's interpreter long: for both dtypes, and for float32, whose tiles are smaller.
LONG = {"large", "varlen_long_among_short", "varlen_long_first", "varlen_short"}
LONG_FLOAT32 = {"long", "long_prompt", "varlen_two_long", "varlen_ones", "ragged_long"}
for form in FORMS:
    LONG |= {f"{form}_gradient_blocks", f"{form}_rows_9_blocks"}
    LONG_FLOAT32 |= {f"{form}_many_outputs", f"{form}_norm_swiglu_rows_3"}
    LONG_FLOAT32 |= {f"{name}_{form}_proj_1" for name in models()}
for form in ("affine8_32", "affine4_64"):  # the other group sizes run them all
    LONG |= {f"{form}_norm_swiglu_rows_{rows}" for rows in (1, 2, 3, 5, 8, 9)}
    LONG.add(f"{form}_many_outputs")


def skipped(case, dtype, backend, device) -> bool:
    """Triton's interpreter truncates bfloat16 stores, so that only a GPU can prove that dtype, and
    it takes many seconds for what is large: it means something to a CPU's caches only, or has a
    smaller case beside it.
    """
    long = LONG | LONG_FLOAT32 if dtype == torch.float32 else LONG
    if not (INTERPRETED and device == "cpu"):
        return False
    return backend != "triton" or dtype == torch.bfloat16 or case.name in long


RUNS = [
    pytest.param(op, case, dtype, backend, device, id=f"{op}-{case}-{dtype}-{backend}-{device}")
    for op, cases in CASES.items()
    for device in DEVICES
    for case in cases
    for dtype in case.dtypes
    for backend in runnable(op, device)
    if not skipped(case, dtype, backend, device)
]

# The backends come one after another: truth is found once for all of them.
expected = lru_cache(maxsize=1)(Expected)


@pytest.mark.parametrize(("op", "case", "dtype", "backend", "device"), RUNS)
def test_parity(op, case, dtype, backend, device):
    expected(op, case, dtype, device).record(backend).assert_ok()
