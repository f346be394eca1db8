"""Training steps side by side, as `elmkernels bench train` does: time and memory.

The models take turns inside one measurement (`bench.training_step`), whose figures are in
`extra_info`; pytest-benchmark's own table shows how long all of it took. Smoke runs a model of two
small layers without torch.compile; full runs OpenELM-270M.
"""

import pytest
import torch

from elmkernels.bench.benchmark import ACCELERATED, EAGER, Printed, shape_of
from elmkernels.bench.training_step import PRECISIONS, StepSizes, TrainingStep


@pytest.mark.parametrize("precision", PRECISIONS)
def test_train(benchmark, full, precision):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    todo = TrainingStep(
        config=shape_of("OpenELM-270M", full),
        precisions=(precision,),
        sizes=StepSizes.chosen(not full, {}),
        compiled=full,
        device=device,
    )
    results = todo.start()
    benchmark.pedantic(todo.run, (results, Printed()), rounds=1, iterations=1)
    assert results["complete"] and results["parity"]
    found = results["precisions"][precision]
    for name in (EAGER, ACCELERATED):
        assert found["peak"][name]["first"] is not None, f"{name} has no peak"
    benchmark.extra_info.update(found)
