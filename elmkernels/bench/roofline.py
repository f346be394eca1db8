"""How fast a whole model is, eager and accelerated, beside what this machine could do at best.

Three tasks, those of a user: the pass over a prompt (prefill), one token after another
(generation), and a training step (forward, loss, backward; no optimizer). The models take turns,
round by round, and probes of the machine take their turn with them: the fastest probe is the
ceiling. A task's floor is the least time that it can take there: the operations of its matrix
products at the speed of a large product in that dtype, or, for generation, the bytes of all weights
and of the cache at the speed of reading memory.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..generation.sampling import argmax
from ..generation.step import next_logits
from ..openelm.cache import KVCache
from ..openelm.costs import matmul_operations, token_bytes
from ..openelm.loss import next_token_loss, next_tokens
from ..openelm.model import OpenELM
from .benchmark import ACCELERATED, EAGER, EVERY_LOGIT
from .ceilings import Probes, memory_probes, product_probes, surpassed
from .timing import Timing, interleave, peak_memory, synchronize

STAGE_SECONDS = 30.0  # a task takes fewer rounds rather than longer than this
LEAST_ROUNDS = 3
PROBE_CALLS = 5  # in one turn: a probe is short beside a task


@dataclass(frozen=True)
class Work:
    """What a task is at least: the tokens that it counts for, and an amount of bytes or operations,
    of products in a dtype, by what bounds it.
    """

    task: str
    tokens: int
    amount: float
    bound: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Measured:
    """One task: seconds of each model, bytes at its highest (None if that can't be watched), and
    the least work, in bytes or operations, beside how much of it the machine does a second.
    """

    task: str
    tokens: int
    times: dict[str, Timing]
    peaks: dict[str, int | None]
    work: float
    ceiling: float
    bound: str

    @property
    def floor(self) -> float:
        """The least seconds that the task can take at the ceiling."""
        return self.work / self.ceiling

    @property
    def ceiling_missing(self) -> str | None:
        """Why the ceiling isn't usable, or None: a model reached more."""
        return surpassed({name: self.floor / t.median for name, t in self.times.items()})

    @property
    def of_ceiling(self) -> dict[str, float] | None:
        """The share of the ceiling that each model reached; None if that isn't usable."""
        if self.ceiling_missing:
            return None
        return {name: self.floor / t.median for name, t in self.times.items()}

    def ratio(self, baseline: str = EAGER) -> float:
        """How many times faster the accelerated model is; below 1 it is slower."""
        return self.times[baseline].median / self.times[ACCELERATED].median

    def rows(self) -> list[dict[str, Any]]:
        """A line of a table for each model."""
        lines = []
        shares = self.of_ceiling
        ceiling = f"{self.ceiling / 1e9:.0f} {UNITS[self.bound]}" if shares else "not usable"
        for i, (name, t) in enumerate(self.times.items()):
            per_second = self.tokens / t.median
            peak = self.peaks[name]
            lines.append(
                {
                    "task": "" if i else self.task,
                    "model": name,
                    "ms": t.median * 1e3,
                    "p20": t.p20 * 1e3,
                    "p80": t.p80 * 1e3,
                    "tokens/s": per_second if per_second < 1000 else round(per_second),
                    "accelerated is": "" if name == ACCELERATED else f"{self.ratio(name):.2f}x",
                    "of ceiling": f"{shares[name]:.0%}" if shares else None,
                    "ceiling": "" if i else ceiling,
                    "peak MiB": None if peak is None else round(peak / 2**20),
                    "n": t.n,
                }
            )
        return lines

    def json(self) -> dict[str, Any]:
        """Everything measured, for a file."""
        baselines = [name for name in self.times if name != ACCELERATED]
        return asdict(self) | {
            "floor": self.floor,
            "tokens_per_second": {n: self.tokens / t.median for n, t in self.times.items()},
            "of_ceiling": self.of_ceiling,
            "ceiling_missing": self.ceiling_missing,
            "ratio": {name: self.ratio(name) for name in baselines},
        }


# What bounds a task: how to probe it, and the unit of 1e9 of its work a second.
MEMORY, PRODUCTS = "memory", "matrix products"
PROBES: dict[str, Callable[[torch.dtype, torch.device, bool], Probes]] = {
    MEMORY: lambda dtype, device, quick: memory_probes(device, quick),
    PRODUCTS: product_probes,
}
UNITS = {MEMORY: "GB/s", PRODUCTS: "GFLOP/s"}


def prefill(models: Mapping[str, OpenELM], ids: Tensor, rounds: int, quick: bool) -> Measured:
    """A prompt [1, length] through an empty cache, for the logits of its last position; also with
    the logits of every position, which Apple's code computes.
    """
    length = ids.shape[1]

    def task(model: OpenELM, kept: int) -> Callable[[], object]:
        cache = _cache(model, length, ids.device)

        @torch.inference_mode()
        def run() -> object:
            cache.reset()
            return model(ids, cache=cache, logits_to_keep=kept)

        return run

    tasks = {
        EAGER: task(models[EAGER], 1),
        EVERY_LOGIT: task(models[EAGER], 0),
        ACCELERATED: task(models[ACCELERATED], 1),
    }
    operations = matmul_operations(models[EAGER].config, length, 1, training=False)
    work = Work(f"prefill {length}", length, operations, PRODUCTS, _dtype(models))
    return measure_tasks(work, tasks, ids.device, rounds=rounds, quick=quick)


def generation(
    models: Mapping[str, OpenELM], ids: Tensor, steps: int, rounds: int, quick: bool
) -> Measured:
    """`steps` greedy tokens, one pass each, after a prompt [1, length] that is not timed."""
    length = ids.shape[1]

    def task(model: OpenELM) -> Callable[[], object]:
        cache = _cache(model, length + steps, ids.device)
        with torch.inference_mode():
            first = model(ids, cache=cache, logits_to_keep=1)[:, -1].argmax(-1)

        @torch.inference_mode()
        def run() -> object:
            cache.truncate(length)
            token = first
            for _ in range(steps):
                token = argmax(next_logits(model, token, cache))
            return token

        return run

    dtype = _dtype(models)
    nbytes = steps * token_bytes(models[EAGER].config, dtype, length + steps / 2)
    tasks = {name: task(m) for name, m in models.items()}
    work = Work(f"generate {steps} after {length}", steps, nbytes, MEMORY, dtype)
    return measure_tasks(work, tasks, ids.device, rounds=rounds, quick=quick)


def training(models: Mapping[str, OpenELM], ids: Tensor, rounds: int, quick: bool) -> Measured:
    """Forward, mean next-token loss and backward over [1, length] tokens; eager with all the logits
    in memory, as its `forward` gives them.
    """
    targets = next_tokens(ids)

    def task(name: str, model: OpenELM) -> Callable[[], object]:
        parameters = [*model.parameters()]

        def run() -> object:
            eager = name == EAGER
            loss = next_token_loss(model(ids), ids) if eager else model.loss(ids, targets)
            loss.backward()
            for parameter in parameters:
                parameter.grad = None
            return loss.detach()

        return run

    length = ids.shape[1]
    operations = matmul_operations(models[EAGER].config, length, length, training=True)
    tasks = {name: task(name, m) for name, m in models.items()}
    work = Work(f"training step {length}", length, operations, PRODUCTS, _dtype(models))
    return measure_tasks(work, tasks, ids.device, rounds=rounds, quick=quick)


def _dtype(models: Mapping[str, OpenELM]) -> torch.dtype:
    return models[EAGER].token_embeddings.weight.dtype


def _cache(model: OpenELM, length: int, device: torch.device) -> KVCache:
    return KVCache(model.config, 1, length, dtype=model.activation_dtype, device=device)


def measure_tasks(
    work: Work,
    tasks: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    quick: bool,
    peaks: bool = True,
    limit: float = STAGE_SECONDS,
) -> Measured:
    """Tasks that take turns, beside the probes of what bounds them.

    Args:
        work: what each task does at least.
        tasks: {name: one run of it}.
        device: where they run.
        rounds: how often each takes its turn, if there is time.
        quick: probe the machine with less.
        peaks: watch how much memory each needs.
        limit: seconds, roughly; fewer rounds rather than more of them.
    """
    seconds = 0.0
    for run in tasks.values():  # also warms up: libraries choose their kernels, pools fill
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds += time.perf_counter() - start
    highest = {model: peak(run, device) if peaks else None for model, run in tasks.items()}
    affordable = int(limit / seconds) - 3
    rounds = min(rounds, max(LEAST_ROUNDS, affordable))
    probes = PROBES[work.bound](work.dtype, device, quick)
    baselines = {**tasks, **{f"probe {n}": _repeated(call) for n, (call, _) in probes.items()}}
    times = interleave(
        baselines, device=device, min_time=0.0, rounds=rounds, warm_up=0.0, sample_time=0.0
    )
    ceiling = max(
        PROBE_CALLS * done / times.pop(f"probe {n}").median for n, (_, done) in probes.items()
    )
    return Measured(work.task, work.tokens, times, highest, work.amount, ceiling, work.bound)


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PROBE_CALLS):
            call()

    return run


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its highest; None if that can't be watched."""
    if device.type == "cpu" and sys.platform == "linux":
        # What the C library kept of the model measured before would count for nothing.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    try:
        return peak_memory(run, device)
    except RuntimeError as error:
        if "/proc" in str(error):
            return None
        raise
