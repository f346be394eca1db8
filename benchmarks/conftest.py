"""What every benchmark takes: `--size`, and the machine's fingerprint in the results.

    python -m pytest benchmarks/ops                                      # does it run? a minute
    python -m pytest benchmarks/ops --size full --benchmark-json FILE    # figures: an idle machine

Every benchmark's `extra_info` holds its baselines' times and its parity, from the same run; a wrong
result fails the benchmark. `-k "rms_norm and bfloat16"` chooses. Needs `pip install
'elmkernels[bench]'`. The command line prints the same as tables: `elmkernels bench`.
"""

import pytest
import torch

from elmkernels.bench.timing import fingerprint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        choices=("smoke", "full"),
        default="smoke",
        help="smoke: the smallest inputs, briefly; full: those of a model, for as long as it takes",
    )
    parser.addoption("--out", metavar="DIR", help="write results there (integrations)")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["elmkernels"] = fingerprint(device)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether figures are wanted, not only a run."""
    return request.config.getoption("--size") == "full"
