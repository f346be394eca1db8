"""OpenELM in transformers beside plain PyTorch and beside this package's own calls: generation, a
prompt, a training step and its memory. All take turns in one process.

    python -m pytest benchmarks/integrations                              # does it run?
    python benchmarks/integrations/bench_transformers.py --out results.json    # figures
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import elmkernels
from elmkernels import OpenELM, OpenELMConfig, hf
from elmkernels.bench.machine import busy
from elmkernels.bench.timing import fingerprint, interleave, peak_memory

OWN, AUTO, NONE = "elmkernels.generate", "transformers, kernels auto", "transformers, kernels None"
SMALL = {"num_transformer_layers": 2, "model_dim": 256, "vocab_size": 512}


def load(config: OpenELMConfig, kernels: str | None) -> hf.OpenELMForCausalLM:
    body = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16)
    model = hf.OpenELMForCausalLM.from_openelm(body, pad_token_id=0).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if kernels is not None:
        model.accelerate(kernels)
    return model


def generating(models: dict[str, Any], prompt: torch.Tensor, new: int) -> dict[str, Callable]:
    """What takes the prompt and adds so many tokens, by every way there is."""
    options = {"max_new_tokens": new, "do_sample": False}
    ids = prompt.tolist()
    runs = {
        name: lambda model=model: model.generate(prompt, **options)[:, prompt.shape[1] :].tolist()
        for name, model in models.items()
    }
    own = models[AUTO].transformer
    return {OWN: lambda: [row.tokens for row in elmkernels.generate(own, ids, new)], **runs}


def training(models: dict[str, Any], ids: torch.Tensor) -> dict[str, Callable]:
    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return {name: lambda model=model: step(model) for name, model in models.items()}


def measured(runs: dict[str, Callable], rounds: int) -> dict[str, Any]:
    """Seconds of each, and how often as fast as kernels=None it is."""
    times = interleave(runs, rounds=rounds, min_time=0, sample_time=0)
    least = times[NONE].median
    return {
        name: {**asdict(timing), "ratio": least / timing.median} for name, timing in times.items()
    }


def run(config: OpenELMConfig, name: str, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """All figures of one model."""
    results: dict[str, Any] = {
        "complete": False, "busy": busy(), "machine": fingerprint("cpu"), "model": name,
        "transformers": version("transformers"), "dtype": "bfloat16", "prompt": prompt, "new": new,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, config.vocab_size, (1, prompt), generator=generator)
    models = {AUTO: load(config, "auto"), NONE: load(config, None)}
    first, other = (models[n].transformer.parameters() for n in (AUTO, NONE))
    same = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    runs = generating(models, ids[:, : prompt // 4], new)
    tokens = {name: call()[0] for name, call in runs.items()}
    pairs = zip(tokens[OWN], tokens[AUTO], strict=True)
    results |= {"same weights": same, "tokens equal": sum(a == b for a, b in pairs)}
    results["generate"] = measured(runs, rounds)
    results["prompt"] = measured(generating(models, ids, 1), rounds)
    steps = training({name: model.train() for name, model in models.items()}, ids)
    # Each model's first step is its highest: what the allocator keeps hides the later ones.
    results["step memory"] = {name: peak_memory(call) for name, call in steps.items()}
    results["step"] = measured(steps, rounds)
    results["complete"] = True
    return results


def test_transformers(benchmark, full):
    small = OpenELMConfig.from_name("OpenELM-270M", **SMALL)
    config = OpenELMConfig.from_name("OpenELM-270M") if full else small
    name, sizes = ("OpenELM-270M", (512, 64, 5)) if full else ("small", (16, 4, 1))
    results = benchmark.pedantic(run, (config, name, *sizes), rounds=1, iterations=1)
    assert results["complete"] and results["same weights"]
    assert results["tokens equal"] == sizes[1]
    benchmark.extra_info.update(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="OpenELM-270M")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    args = parser.parse_args()
    config = OpenELMConfig.from_name(args.model)
    results = run(config, args.model, args.prompt, args.new, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for what in ("generate", "prompt", "step"):
        for name, found in results[what].items():
            print(f"{what:<9} {name:<28} {found['median']:.3f} s  {found['ratio']:.2f}x")
    print({name: f"{n / 2**20:.0f} MiB" for name, n in results["step memory"].items()})


if __name__ == "__main__":
    main()
