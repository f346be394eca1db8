"""Every op, forward and backward, on every backend that can run here, against its reference."""

import pytest
import torch

from elmkernels.testing import CASES, assert_parity
from elmkernels.testing.parity import runnable

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def skipped(case, dtype, backend, device) -> bool:
    """Triton's interpreter truncates bfloat16 stores, so that only a GPU can prove that dtype, and
    it takes many seconds for what is large, which means something to a CPU's caches only.
    """
    interpreted = backend == "triton" and device == "cpu"
    return interpreted and (dtype == torch.bfloat16 or case.name == "large")


RUNS = [
    pytest.param(op, case, dtype, backend, device, id=f"{op}-{case}-{dtype}-{backend}-{device}")
    for op, cases in CASES.items()
    for device in DEVICES
    for backend in runnable(op, device)
    for case in cases
    for dtype in case.dtypes
    if not skipped(case, dtype, backend, device)
]


@pytest.mark.parametrize(("op", "case", "dtype", "backend", "device"), RUNS)
def test_parity(op, case, dtype, backend, device):
    assert_parity(op, case, dtype, backend, device)
