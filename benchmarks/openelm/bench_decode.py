"""Decoding alone, class by class, by what it must reach: our formats and llama.cpp's files in turn.

Each class has our own bfloat16 beside it, for one row and for four, one token after the other.
`extra_info` has each runner's tokens a second and its share of this machine's reading speed in the
same rounds, and every bar with what was reached: of the reading speed, of our bfloat16, and of
llama.cpp's best file. A bar that is missed is a figure, and no failure. Smoke runs two small
layers; full OpenELM-270M, and OpenELM-1_1B if `-k 1_1B` asks for it. `--out DIR` collects all of
them in DIR/results.json.
"""

import gc
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.acceleration.decoder_weights import snapshot_of
from elmkernels.bench.baselines import llama_cpp
from elmkernels.bench.benchmark import LLAMA, OURS, shape_of
from elmkernels.bench.ceilings import numbers, reads
from elmkernels.bench.generation import one_round
from elmkernels.bench.runners import LlamaRunner, Runner, Task, TorchRunner, compress
from elmkernels.bench.timing import fingerprint

INT8 = " by int8"  # behind a format: its activations are rounded to 8 bits
# {class: (our formats, llama.cpp's files)}, and the bars of a format: how many times llama.cpp's
# best, how many times our bfloat16, which share of the reading speed.
CLASSES = {
    "fp32": (("fp32",), ("f32",)),
    "16-bit": (("bf16", "packed12"), ("bf16", "f16")),
    "int8": (("int8", f"int8{INT8}"), ("q8_0",)),
    "int4": (("int4", f"int4{INT8}"), ("q4_0",)),
}
BARS = {
    "fp32": (1.0, None, 0.9),
    "bf16": (1.05, None, 0.9),
    "packed12": (1.25, 1.25, None),
    "int8": (1.15, 1.75, None),
    "int4": (1.05, 2.9, None),
    f"int8{INT8}": (1.15, None, None),
    f"int4{INT8}": (1.25, None, None),
}
PROMPT = 64


def our_runner(format: str, model: OpenELM) -> Runner:
    """A model of ours in a format, accelerated."""
    form = format.removesuffix(INT8)
    ours = compress(form, model, progress=False)
    accelerate(ours)
    if format.endswith(INT8):
        known = snapshot_of(ours)
        known.weights = replace(known.weights, activations="int8")
    return TorchRunner(f"ours {format}", OURS, ours)


def runners_of(name: str, config: OpenELMConfig, folder: Path) -> tuple[list[Runner], str | None]:
    """All of a class, and why llama.cpp isn't among them."""
    formats, files = CLASSES[name]
    model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16).eval()
    found: list[Runner] = []
    if "bf16" not in formats:
        found.append(our_runner("bf16", model))
    if name == "fp32":
        model = OpenELM.from_config(config, seed=0, dtype=torch.float32).eval()
    found += [our_runner(format, model) for format in formats]
    missing = llama_cpp.missing()
    if missing is None:
        found += [LlamaRunner(model, file, folder) for file in files]
    return found, missing


def figures(
    runners: list[Runner], task: Task, seconds: dict[str, list[float]], read: list[dict]
) -> dict:
    """Of each runner tokens a second, bytes of a step and its share of the reading speed."""
    tops = [max(round_.values()) for round_ in read]
    found = {}
    for runner in (r for r in runners if r.name in seconds):
        taken = seconds[runner.name]
        past = task.prompts.shape[0] * (PROMPT + task.steps / 2)
        nbytes = runner.weight_bytes + runner.cache_token_bytes * past
        shares = [task.steps * nbytes / s / top for s, top in zip(taken, tops, strict=True)]
        median = statistics.median(taken)
        found[runner.name] = {
            "kind": runner.kind,
            "tokens_per_second": task.tokens / median,
            "seconds": taken,
            "step_bytes": nbytes,
            "of_reading": statistics.median(shares),
            "facts": runner.facts,
        }
    return {"reading": statistics.median(tops), "rounds": read, "runners": found}


def bars(name: str, found: dict) -> dict[str, dict]:
    """{format: {bar: {wanted, reached}}}"""
    runners = found["runners"]
    speed = {n: r["tokens_per_second"] for n, r in runners.items()}
    theirs = [speed[n] for n, r in runners.items() if r["kind"] == LLAMA]
    result = {}
    for format in CLASSES[name][0]:
        mine, (of_llama, of_bf16, of_reading) = speed[f"ours {format}"], BARS[format]
        reached = {
            "llama.cpp's best": (of_llama, mine / max(theirs) if theirs else None),
            "our bf16": (of_bf16, mine / speed["ours bf16"]),
            "reading": (of_reading, runners[f"ours {format}"]["of_reading"]),
        }
        result[format] = {k: {"wanted": w, "reached": r} for k, (w, r) in reached.items() if w}
    return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="times a CPU")
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", ["270M", "1_1B"])
def test_decode(benchmark, full, request, tmp_path, size, name, batch):
    if size != "270M" and size not in request.config.getoption("-k"):
        pytest.skip("asked for by name")
    config = shape_of(f"OpenELM-{size}", full)
    steps, rounds, probed = (32, 7, 1 << 28) if full else (2, 2, 1 << 22)
    runners, missing = runners_of(name, config, tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(config.vocab_size, (batch, PROMPT), generator=generator)
    task = Task(f"decode {steps}", prompts, steps)
    x = numbers(probed, torch.device("cpu"))
    probes = {n: (call, x.nbytes) for n, call in reads(x).items()}
    seconds, read = {r.name: [] for r in runners}, []
    try:
        runs = {r.name: r.run(task) for r in runners}
        for run in runs.values():
            run()

        def turns() -> None:
            for n in range(rounds):
                one_round(n, runs, probes, seconds, read)

        benchmark.pedantic(turns, rounds=1, iterations=1)
    finally:
        for runner in runners:
            runner.close()
    found = figures(runners, task, seconds, read)
    found |= {"model": size if full else "small", "class": name, "batch": batch, "steps": steps}
    found |= {"missing": missing, "bars": bars(name, found)}
    assert all(r["tokens_per_second"] > 0 for r in found["runners"].values())
    benchmark.extra_info.update(found)
    if out := request.config.getoption("--out"):
        collect(Path(out) / "results.json", found)
    gc.collect()


def collect(file: Path, found: dict) -> None:
    """Put a record in the place of the one of the same model, class and batch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.is_file() else {"records": []}
    same = ("model", "class", "batch")
    kept = [r for r in known["records"] if any(r[k] != found[k] for k in same)]
    whole = {"command": "benchmarks/openelm/bench_decode.py", "machine": fingerprint("cpu")}
    whole["records"] = [*kept, {**found, "date": whole["machine"]["date"]}]
    file.write_text(json.dumps(whole, indent=1) + "\n")
