"""Whole models side by side, as `elmkernels bench generate` does: a group of formats at a time.

The runners take turns inside one measurement (`bench.generation`), whose figures are in
`extra_info`; pytest-benchmark's own table shows how long all of it took. Smoke runs a model of two
small layers without torch.compile; full runs OpenELM-270M with all baselines that are installed.
"""

import pytest

from elmkernels import OpenELM
from elmkernels.bench.benchmark import Printed, shape_of
from elmkernels.bench.generation import GROUPS, Generation, GenerationSizes


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_generate(benchmark, full, group):
    config = shape_of("OpenELM-270M", full)
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
