"""How fast a whole model is, eager and accelerated, beside what this machine could do at best.

Three tasks, those of a user: the pass over a prompt (prefill), one token after another
(generation), and a training step (forward, loss, backward; no optimizer). The models take turns,
round by round, and a probe of the machine takes its turn with them: the ceiling. A task's floor is
the least time it can take there: the operations of its matrix products at the speed of a large
product in that dtype, or, for generation, the bytes of all weights and of the cache at the speed
of reading memory, each by the fastest of several ways.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..acceleration import projections
from ..generation.step import next_logits
from ..openelm.cache import KVCache
from ..openelm.costs import matmul_operations, token_bytes
from ..openelm.loss import next_token_loss, next_tokens
from ..openelm.model import OpenELM
from .timing import Timing, copies_of, interleave, peak_memory, synchronize

EAGER, ACCELERATED = "eager", "accelerated"
EVERY_LOGIT = "eager, every logit"
STAGE_SECONDS = 30.0  # a task takes fewer rounds rather than longer than this
LEAST_ROUNDS = 3
PROBE_CALLS = 5  # in one turn: a probe is short beside a task


@dataclass(frozen=True)
class Measured:
    """One task: seconds of each model, bytes at its highest (None where it can't be watched), and
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

    def ratio(self, baseline: str = EAGER) -> float:
        """How many times faster the accelerated model is; below 1 it is slower."""
        return self.times[baseline].median / self.times[ACCELERATED].median

    def rows(self) -> list[dict[str, Any]]:
        """A line of a table for each model."""
        lines = []
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
                    "of ceiling": f"{self.floor / t.median:.0%}",
                    "ceiling": "" if i else f"{self.ceiling / 1e9:.0f} {UNITS[self.bound]}",
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
            "of_ceiling": {n: self.floor / t.median for n, t in self.times.items()},
            "ratio": {name: self.ratio(name) for name in baselines},
        }


Probes = dict[str, tuple[Callable[[], object], float]]  # {name: (call, the work it does)}


def _memory_probes(dtype: torch.dtype, device: torch.device, quick: bool) -> Probes:
    n = 1 << (28 if device.type == "cuda" else 25 if quick else 26)
    x = torch.randn(n, device=device)
    matrix, vector = x.view(-1, 4096), torch.randn(4096, device=device)
    (copy,) = copies_of(x.nbytes, device)
    ways = {"sum": x.sum, "mv": lambda: torch.mv(matrix, vector), "copy": copy}
    return {name: (way, float(x.nbytes)) for name, way in ways.items()}


def _product_probes(dtype: torch.dtype, device: torch.device, quick: bool) -> Probes:
    n = 8192 if device.type == "cuda" else 512 if quick else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    ways: dict[str, Callable[[], object]] = {"matmul": lambda: a @ b}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        prepacked = projections.prepack(b)
        ways["prepacked"] = lambda: projections.onednn(a, prepacked)
    return {name: (way, 2.0 * n**3) for name, way in ways.items()}


# What bounds a task: how to probe it, and the unit of 1e9 of its work a second.
MEMORY, PRODUCTS = "memory", "matrix products"
PROBES = {MEMORY: _memory_probes, PRODUCTS: _product_probes}
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
    name, dtype = f"prefill {length}", models[EAGER].token_embeddings.weight.dtype
    return measure_tasks(name, length, tasks, operations, PRODUCTS, dtype, ids, rounds, quick)


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
                token = next_logits(model, token, cache).argmax(-1)
            return token

        return run

    model = models[EAGER]
    dtype = model.token_embeddings.weight.dtype
    nbytes = steps * token_bytes(model.config, dtype, length + steps / 2)
    tasks = {name: task(m) for name, m in models.items()}
    name = f"generate {steps} after {length}"
    return measure_tasks(name, steps, tasks, nbytes, MEMORY, dtype, ids, rounds, quick)


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
    name = f"training step {length}"
    dtype = models[EAGER].token_embeddings.weight.dtype
    return measure_tasks(name, length, tasks, operations, PRODUCTS, dtype, ids, rounds, quick)


def _cache(model: OpenELM, length: int, device: torch.device) -> KVCache:
    return KVCache(model.config, 1, length, dtype=model.activation_dtype, device=device)


def measure_tasks(
    name: str, tokens: int, tasks: dict[str, Callable], work: float, bound: str,
    dtype: torch.dtype, ids: Tensor, rounds: int, quick: bool, peaks: bool = True,
    limit: float = STAGE_SECONDS,
) -> Measured:  # fmt: skip
    """Tasks that take turns, beside the probes of what bounds them; peaks: watch memory here.
    limit: seconds, roughly; fewer rounds rather than more of them.
    """
    device = ids.device
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
    probes = PROBES[bound](dtype, device, quick)
    baselines = tasks | {f"probe {way}": _repeated(call) for way, (call, _) in probes.items()}
    times = interleave(
        baselines, device=device, min_time=0.0, rounds=rounds, warm_up=0.0, sample_time=0.0
    )
    ceiling = max(
        PROBE_CALLS * done / times.pop(f"probe {way}").median for way, (_, done) in probes.items()
    )
    return Measured(name, tokens, times, highest, work, ceiling, bound)


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PROBE_CALLS):
            call()

    return run


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at its highest; None where that can't be watched."""
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
