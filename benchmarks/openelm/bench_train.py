"""Training steps side by side, as `elmkernels bench train` does: time and memory.

The models take turns inside one race (`openelm.step_race`), whose figures are in `extra_info`;
pytest-benchmark's own table shows how long the race took. Smoke runs a model of two small layers
without torch.compile; full runs OpenELM-270M.
"""

import pytest
import torch

from elmkernels import OpenELMConfig
from elmkernels.bench import roofline, training_step

SMALL = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=128,
    head_dim=64,
    num_gqa_groups=2,
    vocab_size=512,
    ffn_dim_divisor=64,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    normalize_qk_projections=True,
    share_input_output_layers=True,
)


@pytest.mark.parametrize("precision", training_step.PRECISIONS)
def test_train(benchmark, full, precision):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    race = training_step.StepRace(
        OpenELMConfig.from_name("OpenELM-270M") if full else SMALL,
        (precision,),
        training_step.Sizes() if full else training_step.QUICK,
        compiled=full,
        device=device,
    )
    results = training_step.start(race)
    stages = lambda text: None  # noqa: E731
    benchmark.pedantic(training_step.run, (race, results, stages, print), rounds=1, iterations=1)
    assert results["complete"] and results["parity"]
    found = results["precisions"][precision]
    for name in (roofline.EAGER, roofline.ACCELERATED):
        assert found["peak"][name]["first"] is not None, f"{name} has no peak"
    benchmark.extra_info.update(found)
