"""The main job: accelerate a copy of a model, prove it, time it, dtype by dtype.

Results are one dict of plain values, filled as they are measured: whoever stops the job early has
all that was finished before, and `complete` says False.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..acceleration.swap import accelerate
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from ..openelm.surgery import twin
from ..testing.model_parity import ModelParity, check_model
from . import roofline
from .machine import busy
from .ops import format_table
from .timing import fingerprint

STAGES = ("model", "parity", "prefill", "generation", "training step")


@dataclass(frozen=True)
class Sizes:
    """How much is run: tokens of each task, and rounds of each measurement."""

    parity_batch: int = 2
    parity: int = 64
    greedy: int = 32
    prefill: int = 512
    prompt: int = 128
    generated: int = 64
    training: int = 512
    rounds: int = 5

    def within(self, config: OpenELMConfig) -> "Sizes":
        """The same, shortened to the positions that a model has."""
        room = config.rope_max_length
        prompt = min(self.prompt, max(1, room // 2))
        return Sizes(
            self.parity_batch,
            min(self.parity, max(2, room // 2)),
            min(self.greedy, room // 2),
            min(self.prefill, room),
            prompt,
            min(self.generated, room - prompt),
            min(self.training, room),
            self.rounds,
        )


QUICK = Sizes(2, 32, 8, 64, 16, 8, 64, 2)


@dataclass(frozen=True)
class Job:
    """What to run. load: the model in a dtype; weights: where they come from, in words."""

    load: Callable[[torch.dtype], OpenELM]
    name: str
    weights: str
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    sizes: Sizes
    quick: bool = False
    backend: str | None = None
    prepack: bool = False
    seed: int = 0


def start(job: Job) -> dict[str, Any]:
    """The results of a job before anything is measured."""
    return {
        "complete": False,
        "model": job.name,
        "weights": job.weights,
        "machine": fingerprint(job.device),
        "busy": busy(),
        "device": str(job.device),
        "quick": job.quick,
        "backend": job.backend,
        "prepack": job.prepack,
        "seed": job.seed,
        "dtypes": {},
    }


def run(
    job: Job,
    results: dict[str, Any],
    stage: Callable[[str], None],
    emit: Callable[[str], None],
) -> None:
    """Fill `results`. stage is told what is done next, emit each finished part as text."""
    for dtype in job.dtypes:
        _run_dtype(job, dtype, results, stage, emit)
    results["complete"] = True


def passed(results: dict[str, Any]) -> bool:
    """Whether no parity that was measured failed."""
    return all(found.get("parity", {"ok": True})["ok"] for found in results["dtypes"].values())


def _run_dtype(
    job: Job, dtype: torch.dtype, results: dict[str, Any], stage: Callable, emit: Callable
) -> None:
    name = str(dtype).removeprefix("torch.")
    found: dict[str, Any] = {"speed": []}
    stage(f"{name}: model")
    model = job.load(dtype)
    sizes = job.sizes.within(model.config)
    if "config" not in results:
        results["config"] = model.config.to_hf_dict()
        results["parameters"] = model.config.num_parameters
        results["sizes"] = asdict(sizes)
        emit(_headline(job, model.config, results))
    results["dtypes"][name] = found
    accelerated = twin(model)
    report = accelerate(accelerated, backend=job.backend, prepack=job.prepack)
    found["accelerated"] = {f.name: getattr(report, f.name) for f in fields(report)}
    found["accelerated"]["gemm"] = asdict(report.gemm)
    emit(f"\n{name}\n{report}")

    def tokens(batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(job.seed + 1)
        ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
        return ids.to(job.device)

    stage(f"{name}: parity")
    ids = tokens(sizes.parity_batch, sizes.parity)
    parity = check_model(model, accelerated, ids, sizes.greedy, report.gemm)
    found["parity"] = parity.json()
    emit("\n" + parity_text(parity))

    models = {roofline.EAGER: model, roofline.ACCELERATED: accelerated}
    prompt, how = tokens(1, sizes.prompt), (sizes.rounds, job.quick)
    tasks = {
        "prefill": lambda: roofline.prefill(models, tokens(1, sizes.prefill), *how),
        "generation": lambda: roofline.generation(models, prompt, sizes.generated, *how),
        "training step": lambda: roofline.training(models, tokens(1, sizes.training), *how),
    }
    measured: list[roofline.Measured] = []
    try:
        for task, measure in tasks.items():
            stage(f"{name}: {task}")
            measured.append(measure())
            found["speed"].append(measured[-1].json())
    finally:
        if measured:
            emit("\n" + speed_text(measured))


def _headline(job: Job, config: OpenELMConfig, results: dict[str, Any]) -> str:
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"{job.name}, {config.num_parameters / 1e6:.1f}M parameters, {job.weights}",
        f"on {job.device}: {where}, torch {machine['torch']}",
    ]
    return "\n".join([*lines, *([results["busy"]] if results["busy"] else [])])


def parity_text(parity: ModelParity) -> str:
    """The table of kinds, the losses, the greedy tokens and the verdict."""
    batch, length = parity.shape
    truth = f"truth is eager {parity.truth}" if parity.truth else "no truth"
    losses = ", ".join(f"{name} {value:.6f}" for name, value in parity.losses.items())
    g = parity.greedy
    greedy = f"greedy tokens: the first {g.equal} of {g.steps} equal in all {g.rows} rows"
    if g.equal < g.steps:
        verdict = "a tie" if g.ok else "FAILED"
        greedy += f"; then {verdict}: logits {g.gap:.3g} apart, {g.gap_allowed:.3g} allowed"
    return "\n".join(
        [
            f"parity of eager and accelerated on {batch} x {length} tokens "
            f"({truth}; {parity.rule})",
            format_table(parity.rows()),
            f"loss: {losses}",
            greedy,
            f"parity: {'ok' if parity.ok else 'FAILED'}",
        ]
    )


def speed_text(measured: list[roofline.Measured]) -> str:
    """The table of tasks, and by name what the accelerated model loses."""
    lines = [
        "speed (median of n with p20 and p80; ceilings are this machine's, in the same rounds)",
        format_table([row for m in measured for row in m.rows()]),
    ]
    lines += [f"{m.task}: {m.ceiling_missing}" for m in measured if m.ceiling_missing]
    slower = [f"{m.task} ({m.ratio():.2f}x)" for m in measured if m.ratio() < 1]
    if slower:
        lines.append(f"slower than eager: {', '.join(slower)}")
    return "\n".join(lines)


def weights_of(
    path: Path | None, config: str | None, model_name: str, seed: int, device: torch.device
) -> Callable[[torch.dtype], OpenELM]:
    """How to get the model in a dtype: from a checkpoint, or drawn with a seed."""

    def load(dtype: torch.dtype) -> OpenELM:
        if path is not None:
            return OpenELM.from_pretrained(path, config=config, dtype=dtype, device=device)
        drawn = OpenELMConfig.from_name(model_name)
        return OpenELM.from_config(drawn, seed=seed, dtype=dtype, device=device)

    return load
