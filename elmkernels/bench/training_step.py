"""Training steps side by side, as `elmkernels bench train` does: eager, compiled and accelerated.

A step is what a training loop repeats for every batch: forward, loss with z-loss, backward, here
with float32 weights, in float32 or in bfloat16 by autocast. The optimizer is torch's own whoever
runs the model and is left out. Times are taken with gradients that are made anew by every step.

Memory is watched in a fresh process for each model: the highest resident set of one step beyond
the weights, once with gradients that the step makes ("first") and once with gradients that are
there already and are added to ("next"), as in the second of several accumulated batches.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..acceleration.projections import Plan
from ..acceleration.swap import accelerate
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from ..testing import model_parity
from . import roofline
from .machine import busy
from .timing import fingerprint, keep_pages

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILED = "compiled"
Z_LOSS = 1e-4
SECONDS = 120.0  # of one precision's times: fewer rounds rather than longer


@dataclass(frozen=True)
class Sizes:
    tokens: int = 512
    batch: int = 1
    rounds: int = 7


QUICK = Sizes(tokens=64, rounds=3)


@dataclass(frozen=True)
class StepRace:
    """What to measure: a model's shape with random weights."""

    config: OpenELMConfig
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    sizes: Sizes = Sizes()
    compiled: bool = True
    backend: str | None = None
    seed: int = 0
    device: torch.device = torch.device("cpu")
    memory: bool = True

    @property
    def stages(self) -> int:
        return 1 + len(self.precisions) * (2 if self.memory else 1)


def loss_of(model: OpenELM, ids: Tensor, precision: str) -> Tensor:
    """The loss of predicting ids[:, 1:], ids [batch, tokens + 1]."""
    on = precision != "fp32"
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=on):
        return model.loss(ids[:, :-1], ids[:, 1:], z_loss=Z_LOSS)


def drop_gradients(model: OpenELM) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _ids(race: StepRace) -> Tensor:
    generator = torch.Generator().manual_seed(race.seed + 1)
    shape = race.sizes.batch, race.sizes.tokens + 1
    return torch.randint(race.config.vocab_size, shape, generator=generator).to(race.device)


def _model(race: StepRace, name: str) -> tuple[OpenELM, Plan]:
    """A model, and the routines of its projections."""
    model = OpenELM.from_config(race.config, seed=race.seed, device=race.device)
    if name == roofline.ACCELERATED:
        return model, accelerate(model, backend=race.backend).gemm
    return model, Plan()


def _peaks(race: StepRace, name: str, precision: str) -> dict[str, int | None]:
    """Bytes of one step at its highest, in this process, which should have done nothing else."""
    (model, _), ids = _model(race, name), _ids(race)

    def step() -> None:
        loss_of(model, ids, precision).backward()

    step()  # libraries choose their kernels
    drop_gradients(model)
    first = roofline.peak(step, race.device)
    following = roofline.peak(step, race.device)
    return {"first": first, "next": following}


def _send_peaks(queue: Any, *arguments: Any) -> None:
    queue.put(_peaks(*arguments))


def _peaks_apart(race: StepRace, name: str, precision: str) -> dict[str, int | None]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_send_peaks, args=(queue, race, name, precision))
    child.start()
    child.join()
    if child.exitcode:
        return {"first": None, "next": None}
    return queue.get()


def start(race: StepRace) -> dict[str, Any]:
    """The results before anything is measured."""
    return {
        "model": race.config.model_name,
        "weights": f"random weights of seed {race.seed}, float32",
        "sizes": asdict(race.sizes),
        "backend": race.backend,
        "machine": fingerprint(race.device),
        "busy": busy(),
        "parity": None,
        "precisions": {},
        "complete": False,
    }


def run(
    race: StepRace,
    results: dict[str, Any],
    stage: Callable[[str], None],
    emit: Callable[[str], None],
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Measure everything, filling `results` as it comes; keep() after each part."""
    from .ops import format_table

    if race.device.type == "cpu":
        keep_pages()
    if results["busy"]:
        emit(results["busy"])
    ids = _ids(race)
    stage("parity")
    (eager, _), (accelerated, plan) = (
        _model(race, name) for name in (roofline.EAGER, roofline.ACCELERATED)
    )
    models = {roofline.EAGER: eager, roofline.ACCELERATED: accelerated}
    parity = model_parity.check_model(eager, accelerated, ids[:, :64], 8, plan)
    results["parity"] = parity.ok
    emit(f"parity: {'ok' if parity.ok else 'FAILED'}")
    tokens = race.sizes.batch * race.sizes.tokens
    operations = race.sizes.batch * roofline.matmul_operations(
        race.config, race.sizes.tokens, race.sizes.tokens, training=True
    )
    for precision in race.precisions:
        stage(f"{precision}: time")
        tasks = {name: _step(model, ids, precision) for name, model in models.items()}
        if race.compiled:
            torch.compiler.reset()
            fast = torch.compile(loss_of)
            tasks[COMPILED] = _step(models[roofline.EAGER], ids, precision, fast)
        losses = {name: float(task()) for name, task in tasks.items()}
        measured = roofline.measure_tasks(
            f"training step {race.sizes.batch} x {race.sizes.tokens}", tokens, tasks, operations,
            roofline.PRODUCTS, PRECISIONS[precision], ids, race.sizes.rounds, False, peaks=False,
            limit=SECONDS,
        )  # fmt: skip
        found = results["precisions"][precision] = measured.json() | {"losses": losses, "peak": {}}
        keep()
        if race.memory:
            stage(f"{precision}: memory")
            for name in (roofline.EAGER, roofline.ACCELERATED):
                found["peak"][name] = _peaks_apart(race, name, precision)
        emit(format_table([row | _memory(found, row["model"]) for row in measured.rows()]))
        if measured.ceiling_missing:
            emit(f"{precision}: {measured.ceiling_missing}")
        keep()
    results["complete"] = True


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
