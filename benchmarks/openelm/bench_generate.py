"""Whole models side by side, as `elmkernels bench generate` does: a group of formats at a time.

The runners take turns inside one measurement (`bench.generation`), whose figures are in
`extra_info`; pytest-benchmark's own table shows how long all of it took. Smoke runs a model of two
small layers without torch.compile; full runs OpenELM-270M with all baselines that are installed.
"""

import pytest

from elmkernels import OpenELM, OpenELMConfig
from elmkernels.bench.benchmark import Printed
from elmkernels.bench.generation import GROUPS, Generation, GenerationSizes

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
    ffn_with_glu=True,
    share_input_output_layers=True,
)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_generate(benchmark, full, group):
    config = OpenELMConfig.from_name("OpenELM-270M") if full else SMALL
    todo = Generation(
        load=lambda dtype: OpenELM.from_config(config, seed=0, dtype=dtype),
        name=config.model_name or "small",
        weights="random weights of seed 0",
        formats=group.formats,
        sizes=GenerationSizes.chosen(not full, {}),
        compiled=full,
    )
    results = todo.start()
    benchmark.pedantic(todo.run, (results, Printed()), rounds=1, iterations=1)
    assert results["complete"]
    found = results["groups"][group.name]
    for format in group.formats:
        agree = found["runners"][f"ours {format}"]["agree"]
        assert agree["equal"] > 0, f"ours {format} is not the model: {agree}"
    benchmark.extra_info.update(found)
