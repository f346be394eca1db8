"""The loop: one optimizer step after another, the same numbers however many processes do them.

Step s takes the G = batch.sequences sequences after those of the steps before. Process r of W has
the r-th G/W of them, in micro batches whose gradients add up. With n targets in all of the step:

    loss = sum over all targets of the step / n        grad = d loss / d parameters
    norm = ||grad||, grad <- grad min(1, grad_clip / norm), AdamW at the schedule's rate

DDP and FSDP take the mean over processes, so each one's loss is multiplied by W.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .. import checks
from ..acceleration.routines import Plan
from ..acceleration.swap import accelerate
from ..devices import backend_choices, whole_model_backends
from ..openelm.compressed import Compressed
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from . import optim, routines, speed, state
from .data.sequences import IGNORE, Sequences, VarlenBatch
from .journal import Journal
from .parallel import LossOf, World, accumulation, whole, wrap
from .recipe import Recipe, model_config, to_mapping

# So many updates left out in a row are no accident any more.
MOST_SKIPPED = 100


class Failed(RuntimeError):
    """A run that can't go on; what it had learned by then is in its last checkpoint."""


class StepResult(NamedTuple):
    """What one step gave. update: whether it was carried out."""

    loss: float
    norm: float
    lr: float
    targets: int
    update: bool


def first_model(recipe: Recipe, config: OpenELMConfig) -> OpenELM:
    """The model as training begins, float32 on the CPU, whence it has the same bits everywhere."""
    if recipe.initial is None:
        return OpenELM.from_config(config, seed=recipe.seed, dtype=torch.float32, device="cpu")
    given = None if Path(recipe.initial).is_dir() else config
    model = OpenELM.from_pretrained(recipe.initial, config=given, dtype=torch.float32, device="cpu")
    if any(isinstance(module, Compressed) for module in model.modules()):
        checks.fail(
            "initial", "a checkpoint of plain weights", f"compressed ones: {recipe.initial}"
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # not the mapped file
    return model


def check_share(recipe: Recipe, world: World) -> None:
    """Raises ValueError where a step can't be dealt out evenly."""
    if recipe.batch.sequences % world.size:
        expected = f"a multiple of the {world.size} processes"
        checks.fail("batch.sequences", expected, recipe.batch.sequences)


def check_kernels(recipe: Recipe, world: World) -> None:
    """Raises ValueError, before any text is tokenized, for a named backend that can't run a model
    here.
    """
    name = recipe.engine.kernels
    if isinstance(name, str):
        if name not in (whole := whole_model_backends()):
            checks.fail("engine.kernels", f"a boolean or one of {', '.join(whole)}", repr(name))
        try:
            backend_choices(world.device, name)
        except RuntimeError as error:
            raise ValueError(f"engine.kernels: {error}") from error


class Trainer:
    """One process's part of a run. sequences: what is trained on; held_out: what evaluations see.

    plan: the projections' routines of the run that is gone on with.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        world: World,
        sequences: Sequences,
        held_out: Sequences | None = None,
        plan: Plan | None = None,
    ) -> None:
        check_share(recipe, world)
        check_kernels(recipe, world)
        self.recipe, self.out, self.world = recipe, out, world
        self.sequences, self.held_out = sequences, held_out
        self.config = model_config(recipe)
        engine, loss = recipe.engine, recipe.loss
        self.model = first_model(recipe, self.config).to(world.device)
        self.model.gradient_checkpointing = engine.checkpoint_activations
        self.accelerated = None
        if engine.kernels:
            backend = engine.kernels if isinstance(engine.kernels, str) else None
            plan = world.together(lambda: routines.chosen(engine.plan, plan, world.device))
            self.accelerated = accelerate(self.model, backend=backend, plan=plan)
        self.bf16 = engine.precision == "bf16"
        self.inner = LossOf(self.model, loss.z_loss, loss.label_smoothing)
        self.module = wrap(self.inner, engine.parallel, self.bf16, world)
        self.optimizer = optim.build(self.model, recipe)
        self.done = 0  # steps
        self.position = 0  # sequences that were taken so far
        self.skipped = 0
        self.saved: int | None = None  # the step of the last checkpoint
        self.last: StepResult | None = None
        self.evaluated: dict[str, float] | None = None
        self.seconds = 0.0  # of the steps of this process

    # One step.

    def step(self) -> StepResult:
        """Make the next update, or leave it out where loss or gradients aren't finite."""
        batch, world = self.recipe.batch, self.world
        lr = optim.learning_rate(self.recipe.schedule, self.done)
        optim.set_learning_rate(self.optimizer, lr)
        share = batch.sequences // world.size
        first = self.position + world.rank * share
        micros = [
            self.sequences.batch(first + i, min(batch.micro, share - i))
            for i in range(0, share, batch.micro)
        ]
        own = sum(int((micro.targets != IGNORE).sum()) for micro in micros)
        targets = int(world.sum(own)[0])
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        for i, micro in enumerate(micros):
            with accumulation(self.module, last=i == len(micros) - 1):
                loss = self._loss(self.module, micro, plain=False) / max(targets, 1)
                (loss * world.size).backward()
            total += loss.detach()
        (loss,) = world.sum(float(total))
        parameters = [*self.model.parameters()]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        number, clip = whole(norm), self.recipe.optimizer.grad_clip
        finite = math.isfinite(loss) and math.isfinite(number)
        if finite:
            if clip:
                clip_grads_with_norm_(parameters, clip, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, number, lr, targets, finite)

    def _loss(self, module: nn.Module, batch: VarlenBatch, plain: bool) -> torch.Tensor:
        device = self.world.device
        ids, targets, cu_seqlens = (
            None if x is None else x.to(device, non_blocking=True) for x in batch
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return module(ids, targets, cu_seqlens, plain)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean cross-entropy of the held-out sequences, the same ones every time, and e to it."""
        world, micro = self.world, self.recipe.batch.micro
        count = min(self.recipe.keep.evaluate_sequences, len(self.held_out))
        share = -(-count // world.size)
        first = min(world.rank * share, count)
        last = min(first + share, count)
        # FSDP gathers in every pass: all processes make the same number of them.
        total, targets = 0.0, 0
        self.module.eval()
        for i in range(first, first + share, micro):
            if i < last:
                batch = self.held_out.batch(i, min(micro, last - i))
            else:
                batch = self.held_out.batch(0, 1)
                batch = batch._replace(targets=torch.full_like(batch.targets, IGNORE))
            wrapped = self.module if hasattr(self.module, "unshard") else self.inner
            total += float(self._loss(wrapped, batch, plain=True))
            targets += int((batch.targets != IGNORE).sum())
        self.module.train()
        total, targets = world.sum(total, targets)
        loss = total / max(targets, 1.0)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "sequences": count}

    # Its surroundings.

    def save(self, journal: Journal | None) -> None:
        """Write a checkpoint of this moment, unless there is one."""
        if self.saved == self.done:
            return
        facts = {
            "step": self.done,
            "position": self.position,
            "tokens": len(self.sequences.tokens),
            "skipped": self.skipped,
            "processes": self.world.size,
            "recipe": to_mapping(self.recipe),
            "config": state.plain_config(self.config),
            "plan": self.plan,
            "random": state.random_states(self.world.device),
            "versions": state.versions(),
        }
        keep = self.recipe.keep.checkpoints
        path = state.save(self.out, facts, self.model, self.optimizer, self.world, keep)
        self.saved = self.done
        if journal is not None:
            journal.event("saved", self.done, path=str(path))

    @property
    def plan(self) -> dict[str, Any] | None:
        """The projections' routines, as `engine.plan` names them."""
        return None if self.accelerated is None else asdict(self.accelerated.gemm)

    def resume(self, path: Path, facts: dict[str, Any]) -> None:
        """Go on from a checkpoint that was examined. Raises state.Broken."""
        state.restore(path, facts, self.model, self.optimizer)
        state.set_random_states(facts["random"], self.world.device)
        self.done = self.saved = facts["step"]
        self.position, self.skipped = facts["position"], facts["skipped"]

    def run(self, until: int, journal: Journal | None) -> int | None:
        """Steps up to number `until`, with what the recipe wants beside them. Gives the signal that
        ended it before (every process has then saved), None for none.

        Raises Failed for a loss or gradients that aren't finite, journal.NotSaved.
        """
        keep, row, clock = self.recipe.keep, 0, _Clock(self)
        with signals(self.world.size == 1) as caught:
            while self.done < until:
                stopped = self._stopped(caught)
                if stopped:
                    if keep.checkpoint_every:
                        self.save(journal)
                    return stopped
                begin = time.perf_counter()
                result = self.last = self.step()
                self.seconds += time.perf_counter() - begin
                row = 0 if result.update else row + 1
                if not result.update:
                    self._left_out(result, row, journal)
                self.done += 1
                self.position += self.recipe.batch.sequences
                if journal is not None:
                    journal.advance(self.done)
                    if keep.log_every and (self.done % keep.log_every == 0 or self.done == until):
                        clock.log(result, journal)
                if _due(self.done, keep.evaluate_every, until) and self.held_out is not None:
                    self.evaluated = self.evaluate()
                    if journal is not None:
                        journal.event("evaluation", self.done, **self.evaluated)
                if _due(self.done, keep.checkpoint_every, until):
                    self.save(journal)
        return None

    def _stopped(self, caught: list[int]) -> int | None:
        """The signal that any process has had."""
        asked = (signal.SIGTERM, signal.SIGINT)
        counts = self.world.sum(*(number in caught for number in asked))
        return next((n for n, count in zip(asked, counts, strict=True) if count), None)

    def _left_out(self, result: StepResult, row: int, journal: Journal | None) -> None:
        step = self.done + 1
        found = f"loss {result.loss:g}, gradient norm {result.norm:g}"
        what = f"{found} at step {step}, rate {result.lr:g}"
        self.skipped += 1
        if journal is not None:
            journal.event("skipped", step, loss=result.loss, grad_norm=result.norm, lr=result.lr)
        if self.recipe.on_nan == "skip" and row < MOST_SKIPPED:
            if journal is not None:
                journal.say(f"left out an update: {what}")
            return
        whole = state.newest_whole(self.out)
        rest = "there is no checkpoint" if whole is None else f"the last checkpoint: step {whole}"
        often = f", the update number {row} in a row" if self.recipe.on_nan == "skip" else ""
        raise Failed(f"{what}{often}; it was not made; {rest}")


class _Clock:
    """Figures of the steps since the last that was logged."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps, self.seconds = trainer.done, trainer.seconds
        self.begin = time.perf_counter()
        self._peak: float | None = None

    def log(self, result: StepResult, journal: Journal) -> None:
        t, recipe = self.trainer, self.trainer.recipe
        if self._peak is None:
            dtype = torch.bfloat16 if t.bf16 else torch.float32
            self._peak, source = speed.peak(dtype, t.world.device)
            journal.event("peak", t.done, operations_per_second=self._peak, source=source)
        length = recipe.data.sequence_length
        rate = (t.done - self.steps) * recipe.batch.sequences / (t.seconds - self.seconds)
        mfu = rate * speed.operations(t.config, length) / (self._peak * t.world.size)
        self.steps, self.seconds = t.done, t.seconds
        journal.event(
            "step",
            t.done,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.norm,
            targets=result.targets,
            tokens=t.position * length,
            tokens_per_second=rate * length,
            mfu=mfu,
            seconds=time.perf_counter() - self.begin,
            peak_bytes=speed.peak_bytes(t.world.device),
        )
        journal.show(t.done, result.loss, rate * length, mfu, f", rate {result.lr:.3g}")


def _due(step: int, every: int, until: int) -> bool:
    return bool(every) and (step % every == 0 or step == until)


@contextmanager
def signals(alone: bool) -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list that this gives, for the step to end first. alone:
    a second Ctrl-C interrupts at once; torchrun passes on what its workers have had already.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught and alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
