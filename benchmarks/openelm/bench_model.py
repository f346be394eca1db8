"""A whole model, eager and accelerated: prompt, generation and training step, as `elmkernels` does.

The models take turns inside one measurement (`bench.roofline`), whose figures are in `extra_info`;
pytest-benchmark's own table shows how long the whole comparison took. Smoke runs a model of two
small layers; full runs OpenELM-270M.
"""

import pytest
import torch

from elmkernels import OpenELM, accelerate
from elmkernels.bench import roofline
from elmkernels.bench.benchmark import ACCELERATED, EAGER, shape_of
from elmkernels.surgery import twin
from elmkernels.testing import model_parity

TASKS = ("prefill", "generation", "training")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_model(benchmark, full, dtype, task):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape_of("OpenELM-270M", full)
    eager = OpenELM.from_config(config, seed=0, dtype=dtype, device=device)
    accelerated = twin(eager)
    report = accelerate(accelerated)
    models = {EAGER: eager, ACCELERATED: accelerated}
    length, rounds = (512, 5) if full else (32, 2)
    ids = torch.randint(config.vocab_size, (1, length), device=device)
    parity = model_parity.check_model(eager, accelerated, ids[:, : min(length, 64)], 8)
    assert parity.ok, "the accelerated model is not the reference"
    if task == "generation":
        arguments = (models, ids[:, : length // 4], length // 8, rounds, not full)
    else:
        arguments = (models, ids, rounds, not full)
    measured = benchmark.pedantic(getattr(roofline, task), arguments, rounds=1, iterations=1)
    benchmark.extra_info.update(measured.json(), backends=report.backends)
