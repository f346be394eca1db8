"""The check of a model: accelerate a copy, compare it with the reference, time both, by dtype."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..acceleration.swap import accelerate
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from ..surgery import twin
from ..testing.model_parity import ModelParity, check_model
from . import chart, roofline
from .benchmark import ACCELERATED, EAGER, Benchmark, Report, Results, Sizes, headline
from .table import format_table
from .timing import fingerprint

PARTS = ("model", "parity", "prefill", "generation", "training step")


@dataclass(frozen=True)
class EndToEndSizes(Sizes):
    """Tokens of each part, and rounds of each measurement."""

    parity_batch: int = 2
    parity: int = 64
    greedy: int = 32
    prefill: int = 512
    prompt: int = 128
    generated: int = 64
    training: int = 512
    rounds: int = 5

    @classmethod
    def quick(cls) -> "EndToEndSizes":
        return cls(2, 32, 8, 64, 16, 8, 64, 2)

    def within(self, config: OpenELMConfig) -> "EndToEndSizes":
        """The same, shortened to the positions that a model has."""
        room = config.rope_max_length
        prompt = min(self.prompt, max(1, room // 2))
        return replace(
            self,
            parity=min(self.parity, max(2, room // 2)),
            greedy=min(self.greedy, room // 2),
            prefill=min(self.prefill, room),
            prompt=prompt,
            generated=min(self.generated, room - prompt),
            training=min(self.training, room),
        )


@dataclass(frozen=True, kw_only=True)
class EndToEnd(Benchmark):
    """load: the model in a dtype; weights: where they come from, in words."""

    load: Callable[[torch.dtype], OpenELM]
    name: str
    weights: str
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    sizes: EndToEndSizes
    quick: bool = False
    backend: str | None = None
    prepack: bool | None = None
    seed: int = 0

    @property
    def stages(self) -> int:
        return len(PARTS) * len(self.dtypes)

    def describe(self) -> Results:
        return {
            "model": self.name,
            "weights": self.weights,
            "machine": fingerprint(self.device),
            "device": str(self.device),
            "quick": self.quick,
            "backend": self.backend,
            "prepack": self.prepack,
            "seed": self.seed,
            "dtypes": {},
        }

    def measure(self, results: Results, report: Report) -> None:
        for dtype in self.dtypes:
            _run_dtype(self, dtype, results, report)

    def passed(self, results: Results) -> bool:
        return all(found.get("parity", {"ok": True})["ok"] for found in results["dtypes"].values())

    def chart(self, results: Results, folder: Path) -> list[str]:
        tasks = {dtype: found["speed"] for dtype, found in results["dtypes"].items()}
        return chart.draw(f"{self.name} ({self.weights})", tasks, folder / "chart.png")

    def tokens(self, config: OpenELMConfig, batch: int, length: int) -> Tensor:
        """Drawn with the seed, the same for every task of a shape."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
        return ids.to(self.device)


def _run_dtype(todo: EndToEnd, dtype: torch.dtype, results: Results, report: Report) -> None:
    name = str(dtype).removeprefix("torch.")
    found: Results = {"speed": []}
    report.stage(f"{name}: model")
    model = todo.load(dtype)
    sizes = todo.sizes.within(model.config)
    if "config" not in results:
        results["config"] = model.config.to_hf_dict()
        results["parameters"] = model.config.num_parameters
        results["sizes"] = asdict(sizes)
        report.print(headline(results, todo.device))
    results["dtypes"][name] = found
    accelerated = twin(model)
    done = accelerate(accelerated, backend=todo.backend, prepack=todo.prepack)
    found["accelerated"] = {f.name: getattr(done, f.name) for f in fields(done)}
    found["accelerated"]["gemm"] = asdict(done.gemm)
    report.print(f"\n{name}\n{done}")
    report.stage(f"{name}: parity")
    ids = todo.tokens(model.config, sizes.parity_batch, sizes.parity)
    parity = check_model(model, accelerated, ids, sizes.greedy, done.gemm)
    found["parity"] = parity.json()
    report.print("\n" + parity_text(parity))
    models = {EAGER: model, ACCELERATED: accelerated}
    measured: list[roofline.Measured] = []
    try:
        for task, measure in _tasks(todo, sizes, models).items():
            report.stage(f"{name}: {task}")
            measured.append(measure())
            found["speed"].append(measured[-1].json())
    finally:
        if measured:
            report.print("\n" + speed_text(measured))


def _tasks(
    todo: EndToEnd, sizes: EndToEndSizes, models: dict[str, OpenELM]
) -> dict[str, Callable[[], roofline.Measured]]:
    """What is timed, by the names in PARTS."""

    def ids(length: int) -> Tensor:
        return todo.tokens(models[EAGER].config, 1, length)

    how = (sizes.rounds, todo.quick)
    return {
        "prefill": lambda: roofline.prefill(models, ids(sizes.prefill), *how),
        "generation": lambda: roofline.generation(models, ids(sizes.prompt), sizes.generated, *how),
        "training step": lambda: roofline.training(models, ids(sizes.training), *how),
    }


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
