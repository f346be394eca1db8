"""Training steps side by side, as `elmkernels bench train` does: eager, compiled and accelerated.

A step is what a training loop repeats for every batch: forward, loss with z-loss, backward, here
with float32 weights, in float32 or in bfloat16 by autocast. The optimizer is torch's own for
every model and is left out. Times are taken with gradients that are made anew by every step.

Memory is watched in a fresh process for each model: the highest resident set of one step beyond
the weights, once with gradients that the step makes ("first") and once with gradients that are
there already and are added to ("next"), as in the second of several accumulated batches.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..acceleration.routines import Plan
from ..acceleration.swap import accelerate
from ..openelm.config import OpenELMConfig
from ..openelm.costs import matmul_operations
from ..openelm.model import OpenELM
from ..testing import model_parity
from . import chart
from .benchmark import ACCELERATED, COMPILED, EAGER, Benchmark, Report, Results, Sizes
from .roofline import PRODUCTS, Work, measure_tasks, peak
from .table import format_table
from .timing import fingerprint, keep_pages

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
Z_LOSS = 1e-4
SECONDS = 120.0  # of one precision's times: fewer rounds rather than longer


@dataclass(frozen=True)
class StepSizes(Sizes):
    """Tokens of a sequence, sequences in a step, rounds."""

    tokens: int = 512
    batch: int = 1
    rounds: int = 7

    @classmethod
    def quick(cls) -> "StepSizes":
        return cls(tokens=64, rounds=3)


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Benchmark):
    """config: the shape of a model with random weights. memory: watch its peaks too."""

    config: OpenELMConfig
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    sizes: StepSizes = StepSizes()
    compiled: bool = True
    backend: str | None = None
    seed: int = 0
    device: torch.device = torch.device("cpu")
    memory: bool = True

    @property
    def stages(self) -> int:
        return 1 + len(self.precisions) * (2 if self.memory else 1)

    @property
    def work(self) -> Work:
        """The products of one step."""
        s = self.sizes
        operations = matmul_operations(self.config, s.tokens, s.tokens, training=True)
        name, tokens = f"training step {s.batch} x {s.tokens}", s.batch * s.tokens
        return Work(name, tokens, s.batch * operations, PRODUCTS, torch.float32)

    def describe(self) -> Results:
        return {
            "model": self.config.model_name,
            "weights": f"random weights of seed {self.seed}, float32",
            "sizes": asdict(self.sizes),
            "backend": self.backend,
            "machine": fingerprint(self.device),
            "parity": None,
            "precisions": {},
        }

    def measure(self, results: Results, report: Report) -> None:
        if self.device.type == "cpu":
            keep_pages()
        ids = _ids(self)
        report.stage("parity")
        (eager, _), (accelerated, plan) = (_model(self, name) for name in (EAGER, ACCELERATED))
        parity = model_parity.check_model(eager, accelerated, ids[:, :64], 8, plan)
        results["parity"] = parity.ok
        report.print(f"parity: {'ok' if parity.ok else 'FAILED'}")
        models = {EAGER: eager, ACCELERATED: accelerated}
        for precision in self.precisions:
            _run_precision(self, precision, models, ids, results, report)

    def passed(self, results: Results) -> bool:
        return results["parity"] is not False

    def chart(self, results: Results, folder: Path) -> list[str]:
        tasks = {name: [task] for name, task in results["precisions"].items()}
        return chart.draw(f"{self.config.model_name}, training", tasks, folder / "chart.png")


def _run_precision(
    todo: TrainingStep,
    precision: str,
    models: dict[str, OpenELM],
    ids: Tensor,
    results: Results,
    report: Report,
) -> None:
    report.stage(f"{precision}: time")
    tasks = {name: _step(model, ids, precision) for name, model in models.items()}
    if todo.compiled:
        torch.compiler.reset()
        tasks[COMPILED] = _step(models[EAGER], ids, precision, torch.compile(loss_of))
    losses = {name: float(task()) for name, task in tasks.items()}
    work = replace(todo.work, dtype=PRECISIONS[precision])
    measured = measure_tasks(
        work,
        tasks,
        todo.device,
        rounds=todo.sizes.rounds,
        quick=False,
        peaks=False,
        limit=SECONDS,
    )
    found = results["precisions"][precision] = measured.json() | {"losses": losses, "peak": {}}
    report.save()
    if todo.memory:
        report.stage(f"{precision}: memory")
        for name in (EAGER, ACCELERATED):
            found["peak"][name] = _peaks_apart(todo, name, precision)
    report.print(format_table([row | _memory(found, row["model"]) for row in measured.rows()]))
    if measured.ceiling_missing:
        report.print(f"{precision}: {measured.ceiling_missing}")
    report.save()


def loss_of(model: OpenELM, ids: Tensor, precision: str) -> Tensor:
    """The loss of predicting ids[:, 1:], ids [batch, tokens + 1]."""
    on = precision != "fp32"
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=on):
        return model.loss(ids[:, :-1], ids[:, 1:], z_loss=Z_LOSS)


def drop_gradients(model: OpenELM) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _ids(todo: TrainingStep) -> Tensor:
    generator = torch.Generator().manual_seed(todo.seed + 1)
    shape = todo.sizes.batch, todo.sizes.tokens + 1
    return torch.randint(todo.config.vocab_size, shape, generator=generator).to(todo.device)


def _model(todo: TrainingStep, name: str) -> tuple[OpenELM, Plan]:
    """A model, and the routines of its projections."""
    model = OpenELM.from_config(todo.config, seed=todo.seed, device=todo.device)
    if name == ACCELERATED:
        return model, accelerate(model, backend=todo.backend).gemm
    return model, Plan()


def _peaks(todo: TrainingStep, name: str, precision: str) -> dict[str, int | None]:
    """Bytes of one step at its highest, in this process, which should have done nothing else."""
    (model, _), ids = _model(todo, name), _ids(todo)

    def step() -> None:
        loss_of(model, ids, precision).backward()

    step()  # libraries choose their kernels
    drop_gradients(model)
    first = peak(step, todo.device)
    following = peak(step, todo.device)
    return {"first": first, "next": following}


def _send_peaks(queue: Any, *arguments: Any) -> None:
    queue.put(_peaks(*arguments))


def _peaks_apart(todo: TrainingStep, name: str, precision: str) -> dict[str, int | None]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_send_peaks, args=(queue, todo, name, precision))
    child.start()
    child.join()
    if child.exitcode:
        return {"first": None, "next": None}
    return queue.get()


def _memory(found: dict[str, Any], name: str) -> dict[str, float | None]:
    peaks = found["peak"].get(name, {})
    return {
        f"{when} peak MiB": None if peaks.get(when) is None else round(peaks[when] / 2**20)
        for when in ("first", "next")
    }


def _step(
    model: OpenELM, ids: Tensor, precision: str, loss: Callable[..., Tensor] = loss_of
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        drop_gradients(model)
        value = loss(model, ids, precision)
        value.backward()
        drop_gradients(model)
        return value.detach()

    return step
