"""OpenELM in transformers, with the kernels, without, and by this package's own functions.

    python -m pytest benchmarks/integrations                             # does it run?
    python benchmarks/integrations/bench_transformers.py --out FOLDER    # figures: an idle machine

The models take turns; memory is measured in processes of their own. Each task writes what it found
into FOLDER/results.json as it ends, so tasks can be run one by one (`--tasks`). The weights are
random, in bfloat16; the Trainer's are float32 under bfloat16 autocast.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from elmkernels import OpenELM, OpenELMConfig, generate
from elmkernels.bench.benchmark import shape_of
from elmkernels.bench.machine import busy
from elmkernels.bench.timing import fingerprint, interleave, peak_memory
from elmkernels.openelm import KVCache
from elmkernels.surgery import twin

NATIVE, OWN, PLAIN = "native", "elmkernels", "kernels=None"
TASKS = ("generate", "prefill", "trainer", "lora")
STEPS = ("trainer", "lora")


def config_of(full: bool) -> OpenELMConfig:
    return shape_of("OpenELM-270M", full)


def wrap(body: OpenELM, kernels: str | None):
    from elmkernels import hf

    model = hf.OpenELMForCausalLM.from_openelm(body, pad_token_id=0).eval()
    model.generation_config.eos_token_id = None
    if kernels:
        model.accelerate(kernels)
    return model


def tokens_of(config: OpenELMConfig, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, config.vocab_size, (rows, length), generator=generator)


def pair(full: bool) -> dict[str, Any]:
    """The class with the kernels and without, of the same weights."""
    body = OpenELM.from_config(config_of(full), seed=0, dtype=torch.bfloat16)
    return {NATIVE: wrap(twin(body), "auto"), PLAIN: wrap(body, None)}


def generation(full: bool) -> tuple[dict[str, Callable], dict[str, Any]]:
    """64 tokens after a prompt of 64, greedy, one row."""
    length, new = (64, 64) if full else (5, 3)
    models, prompt = pair(full), tokens_of(config_of(full), 1, length)
    calls = {
        name: lambda model=model: model.generate(prompt, max_new_tokens=new, do_sample=False)
        for name, model in models.items()
    }
    own = models[NATIVE].transformer
    calls[OWN] = lambda: generate(own, prompt, new)
    equal = calls[NATIVE]()[0, length:].tolist() == calls[OWN]()[0].tokens
    return calls, {"prompt": length, "new": new, "native tokens are elmkernels'": equal}


@torch.no_grad()
def prefill(full: bool) -> tuple[dict[str, Callable], dict[str, Any]]:
    """A prompt of 512 into a new cache, the logits of its last position."""
    length = 512 if full else 9
    models, prompt = pair(full), tokens_of(config_of(full), 1, length)

    def forward(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(prompt, use_cache=True, logits_to_keep=1).logits

    def own() -> torch.Tensor:
        body = models[NATIVE].transformer
        with torch.no_grad():
            cache = KVCache(body.config, 1, length + 1, dtype=torch.bfloat16)
            return body(prompt, cache=cache, logits_to_keep=1)

    calls: dict[str, Callable] = {n: lambda m=m: forward(m) for n, m in models.items()}
    calls[OWN] = own
    return calls, {"prompt": length, "same logits": torch.equal(calls[NATIVE](), own())}


def size_of(full: bool) -> tuple[int, int]:
    """Rows and length of a step."""
    return (1, 512) if full else (2, 8)


def step_of(task: str, kernels: str | None, full: bool) -> Callable[[], float]:
    """A step of the Trainer: forward, backward, AdamW; the LoRA one trains rank 8 on all matrices
    of a bfloat16 model.
    """
    from transformers import Trainer, TrainingArguments

    lora = task == "lora"
    dtype = torch.bfloat16 if lora else torch.float32
    model = wrap(OpenELM.from_config(config_of(full), seed=0, dtype=dtype), kernels)
    if lora:
        import peft

        torch.manual_seed(0)
        names = ["qkv_proj", "out_proj", "proj_1", "proj_2"]
        adapter = peft.LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapter)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), bf16=True, use_cpu=True, report_to=[], max_steps=1, learning_rate=1e-5
    )
    trainer = Trainer(model, arguments)
    optimizer = trainer.create_optimizer()
    rows, length = size_of(full)
    tokens = tokens_of(config_of(full), rows, length)

    count = rows * (length - 1)

    def step() -> float:
        inputs = {"input_ids": tokens, "labels": tokens}
        loss = trainer.training_step(model, inputs, num_items_in_batch=torch.tensor(count))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def training(task: str, full: bool) -> tuple[dict[str, Callable], dict[str, Any]]:
    calls = {name: step_of(task, k, full) for name, k in ((NATIVE, "auto"), (PLAIN, None))}
    losses = {name: call() for name, call in calls.items()}
    rows, length = size_of(full)
    return calls, {"rows": rows, "length": length, "first losses": losses}


def _peak(task: str, kernels: str | None, full: bool, queue: Any) -> None:
    step = step_of(task, kernels, full)
    step()  # the optimizer's own memory is there from the first step on
    queue.put(peak_memory(step))


def peaks(task: str, full: bool) -> dict[str, int]:
    """Bytes that a step needs at its highest beside weights and the optimizer's: gradients,
    activations, logits.
    """
    found, context = {}, multiprocessing.get_context("spawn")
    for name, kernels in ((NATIVE, "auto"), (PLAIN, None)):
        queue = context.SimpleQueue()
        child = context.Process(target=_peak, args=(task, kernels, full, queue))
        child.start()
        found[name] = queue.get()
        child.join()
    return found


def measure(task: str, full: bool, memory: bool = True) -> dict[str, Any]:
    """Seconds of a call of each, and how many times as fast as plain PyTorch and as this package's
    own function the native class is.
    """
    made = {"generate": generation, "prefill": prefill}.get(task)
    held = busy()
    found: dict[str, Any] = {"peak bytes": peaks(task, full)} if memory and made is None else {}
    calls, about = training(task, full) if made is None else made(full)
    rounds = (5 if task in STEPS else 7) if full else 1
    times = interleave(calls, rounds=rounds, min_time=0, warm_up=0, sample_time=0)
    found |= {"seconds": {name: asdict(t) for name, t in times.items()}, **about}
    found["native of"] = {
        name: round(t.median / times[NATIVE].median, 3) for name, t in times.items()
    }
    return {"machine": fingerprint("cpu"), "busy": held, **found}


@pytest.mark.parametrize("task", TASKS)
def test_transformers(benchmark, full, task):
    pytest.importorskip("transformers")
    pytest.importorskip("peft" if task == "lora" else "accelerate")
    found = benchmark.pedantic(measure, (task, full, full), rounds=1, iterations=1)
    benchmark.extra_info.update(found)
    if task == "generate":
        assert found["native tokens are elmkernels'"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="a folder for results.json")
    parser.add_argument("--only", choices=("times", "memory"), help="of a step, measure one")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    for task in args.tasks:
        results = json.loads(file.read_text()) if file.exists() else {}
        found = results.setdefault(task, {})
        if args.only == "memory":
            found["peak bytes"] = peaks(task, True)
        else:
            found |= measure(task, True, args.only is None)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(task, found.get("native of", ""), found.get("peak bytes", ""))


if __name__ == "__main__":
    main()
