"""What a pass of 1 to 8 tokens of one sequence costs beside a pass of one: the curve that guessing
tokens lives on.

    python -m pytest benchmarks/openelm/bench_several_tokens.py --size full --out FOLDER

The passes take turns, round by round, over the same cache; all read every weight once. A pass of n
that costs `of_one` times a pass of one pays if more tokens than that are kept of it, on average.
Smoke runs a model of two small layers; full runs 270M and 1_1B. `--out` has a file for each model
and format.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from elmkernels import OpenELM, decode_step, pack, quantize
from elmkernels.acceleration.decoder_weights import decoder_weights_of
from elmkernels.bench.benchmark import shape_of
from elmkernels.bench.timing import fingerprint, interleave
from elmkernels.openelm.cache import KVCache

MOST = 8
PASTS = (128, 2000)  # tokens in the cache
FORMATS = {
    "bf16": lambda model: None,
    "packed12": lambda model: pack(model, progress=False),
    "int8": lambda model: quantize(model, 8, progress=False),
    "int4": lambda model: quantize(model, 4, progress=False),
}


def passes(model: OpenELM, past: int) -> dict:
    """{number of tokens: that pass, after `past` random ones}. A pass of all is checked to have the
    bits of tokens one by one."""
    model._place_rope_table(torch.device("cpu"), past + MOST)
    weights, dtype = decoder_weights_of(model), model.activation_dtype
    cache = KVCache(model.config, 1, past + MOST, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    cache.arena.data.normal_(generator=generator)
    tokens = torch.randint(model.config.vocab_size, (MOST,), generator=generator)
    places, rows = torch.arange(past, past + MOST), torch.zeros(MOST, dtype=torch.int64)

    def step(first: int, last: int) -> torch.Tensor:
        at = slice(first, last)
        return decode_step(weights, tokens[at], places[at], cache.arena, sequences=rows[at])

    alone = torch.cat([step(i, i + 1) for i in range(MOST)])
    assert torch.equal(step(0, MOST), alone), "a token has other bits among others"
    return {n: lambda n=n: step(0, n) for n in range(1, MOST + 1)}


def measure(model: OpenELM, full: bool) -> dict:
    found = {}
    for past in PASTS:
        timings = interleave(
            passes(model, past), rounds=15 if full else 1, min_time=0.5 if full else 0.0
        )
        one = timings[1].median
        found[f"after {past}"] = {
            n: asdict(timing) | {"of_one": timing.median / one} for n, timing in timings.items()
        }
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["270M", "1_1B"])
def test_several_tokens(benchmark, full, request, name, format):
    if name != "270M" and not full:
        pytest.skip("for figures")
    config = shape_of(f"OpenELM-{name}", full)
    with torch.no_grad():
        model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16).eval()
        FORMATS[format](model)
        found = benchmark.pedantic(measure, (model, full), rounds=1, iterations=1)
    results = {
        "model": config.model_name or "small", "weights": "random weights of seed 0",
        "format": format, "machine": fingerprint("cpu"), "seconds": found,
    }  # fmt: skip
    for past, tokens in found.items():
        shares = ", ".join(f"{n}: {row['of_one']:.3f}x" for n, row in tokens.items())
        print(f"{results['model']} {format} {past}, {1e3 * tokens[1]['median']:.1f} ms; {shares}")
    benchmark.extra_info.update(results)
    out = request.config.getoption("--out")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = Path(out) / f"{results['model']}-{format}.json"
        file.write_text(json.dumps(results, indent=1) + "\n")
