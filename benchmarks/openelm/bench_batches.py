"""Tokens a second of batches that decode, 1 to 64 rows: none falls off a cliff at its ninth row.

All batches of a format take turns inside one measurement, whose figures are in `extra_info` and are
printed; what was chosen for each, groups of rows or the layers, stands beside. Smoke runs a model
of two small layers; full runs OpenELM-270M.
"""

from collections.abc import Callable

import pytest
import torch

from elmkernels import OpenELM, accelerate
from elmkernels.acceleration.decoder_weights import decoder_weights_of
from elmkernels.bench.benchmark import shape_of
from elmkernels.bench.runners import compress
from elmkernels.bench.table import format_table
from elmkernels.bench.timing import interleave
from elmkernels.generation.groups import grouped
from elmkernels.openelm import KVCache, next_logits

BATCHES = (1, 2, 4, 8, 9, 16, 32, 64)


def decoding(model: OpenELM, batch: int, past: int, steps: int) -> Callable[[], None]:
    """Some greedy tokens of each row, after `past` that lie in the cache."""
    cache = KVCache(model.config, batch, past + steps, dtype=model.activation_dtype)
    cache.arena.data.normal_()
    cache.advance(past)
    first = torch.arange(batch) % model.config.vocab_size

    @torch.inference_mode()
    def run() -> None:
        cache.truncate(past)
        tokens = first
        for _ in range(steps):
            tokens = next_logits(model, tokens, cache).argmax(-1)

    return run


@pytest.mark.parametrize("format", ["bf16", "packed12", "int8", "int4"])
def test_batches(benchmark, full, format):
    config = shape_of("OpenELM-270M", full)
    past, steps, rounds = (128, 8, 5) if full else (8, 2, 1)
    model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16).eval()
    model = compress(format, model, progress=False)
    report = accelerate(model)
    tasks = {str(batch): decoding(model, batch, past, steps) for batch in BATCHES}
    for task in tasks.values():
        for _ in range(1 + 128 // (9 * steps)):  # prepacked copies are made after some steps
            task()
    timed = benchmark.pedantic(
        interleave,
        (tasks,),
        {"min_time": 0.0, "rounds": rounds, "warm_up": 0.0, "sample_time": 0.0},
        rounds=1,
        iterations=1,
    )
    weights = decoder_weights_of(model)
    rows = [
        {
            "batch": batch,
            "by": "decode_step" if grouped(model, weights, batch) else "layers",
            "ms a step": timed[str(batch)].median / steps * 1e3,
            "tokens/s": batch * steps / timed[str(batch)].median,
        }
        for batch in BATCHES
    ]
    print(f"\n{format}: {report.gemm}\n{format_table(rows)}")
    assert all(row["tokens/s"] > 0 for row in rows)
    benchmark.extra_info.update(rows=rows, gemm=str(report.gemm))
