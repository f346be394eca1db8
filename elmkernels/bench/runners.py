"""Benchmark runners: one interface over this package, torch.compile and llama.cpp.

A runner is asked for a `Task`: a pass over a prompt, or tokens decoded one by one after prompts
that are not timed. Each answers with a function whose call is the timed work, and that returns the
tokens it chose, the likeliest each time.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration.decoder_weights import decoder_weights_of
from ..acceleration.swap import accelerate, restore
from ..compression.conversion import convert, dense_weight, plain
from ..compression.packing import pack
from ..compression.quantization import quantize
from ..generation.step import greedy, next_logits
from ..openelm.cache import KVCache
from ..openelm.compressed import Compressed
from ..openelm.gguf import export_gguf, rounded
from ..openelm.model import OpenELM
from ..surgery import is_accelerated, twin
from .baselines import llama_cpp
from .benchmark import COMPILED, LLAMA, OURS

TRIAL_STEPS = 16  # to choose llama.cpp's attention by


@dataclass(frozen=True)
class Task:
    """prompts int64 [batch, length]; steps: tokens to decode after them, 0 for the prompt itself,
    which is then what is timed.
    """

    name: str
    prompts: Tensor
    steps: int

    @property
    def tokens(self) -> int:
        """What one run is worth: tokens that went in, or that came out."""
        batch, length = self.prompts.shape
        return batch * (self.steps or length)

    @property
    def length(self) -> int:
        """Tokens in the cache at the end."""
        return self.prompts.shape[1] + self.steps


Run = Callable[[], list[list[int]]]  # the tokens of each row


class Runner:
    """name: in tables. kind: EAGER, COMPILED, OURS or LLAMA. weight_bytes: what a token reads of
    the weights; cache_token_bytes: of each token before it. facts: what else is known, for a file.
    """

    name: str
    kind: str
    weight_bytes: int
    cache_token_bytes: int
    facts: dict[str, Any]

    def run(self, task: Task) -> Run:
        """The work of a task, ready to be timed."""
        raise NotImplementedError

    def truth(self, prompt: Tensor, steps: int) -> list[int] | None:
        """The tokens that the eager model chooses with the very weights of this runner; None if
        they are those of the group's eager model.
        """
        return None

    def end(self) -> None:
        """Let go of what the last task needed."""

    def close(self) -> None:
        """Let go of everything."""


class TorchRunner(Runner):
    """A model of this package: eager, under torch.compile, or accelerated."""

    def __init__(self, name: str, kind: str, model: OpenELM) -> None:
        self.name, self.kind, self.model, self.facts = name, kind, model, {}
        config = model.config
        self.weight_bytes = _weight_bytes(model)
        heads = sum(config.num_kv_heads)
        self.cache_token_bytes = 2 * config.head_dim * heads * model.activation_dtype.itemsize

    def run(self, task: Task) -> Run:
        prompts, steps, model = task.prompts, task.steps, self.model
        batch, length = prompts.shape
        # One slot to spare: a full cache is contiguous, for which torch.compile compiles again.
        room = min(task.length + 1, model.config.rope_max_length)
        cache = KVCache(
            model.config, batch, room, dtype=model.activation_dtype, device=prompts.device
        )
        call = self._compiled(steps) if self.kind == COMPILED else model

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            cache.reset()
            return call(prompts, cache=cache, logits_to_keep=1)[:, -1].argmax(-1)[:, None].tolist()

        if not steps:
            return prefill
        with torch.inference_mode():
            first = model(prompts, cache=cache, logits_to_keep=1)[:, -1].argmax(-1)

        def step(token: Tensor) -> Tensor:
            if self.kind == COMPILED:
                return call(token[:, None], cache=cache, logits_to_keep=1)[:, -1].argmax(-1)
            return next_logits(model, token, cache).argmax(-1)

        @torch.inference_mode()
        def decode() -> list[list[int]]:
            cache.truncate(length)
            chosen = [first]
            for _ in range(steps):
                chosen.append(step(chosen[-1]))
            return torch.stack(chosen, 1).tolist()

        return decode

    def _compiled(self, steps: int) -> Callable:
        """Frozen: the weights are constants that Inductor may lay out as it likes."""
        torch._dynamo.reset()
        return torch.compile(
            self.model, fullgraph=True, dynamic=bool(steps) or None, options={"freezing": True}
        )

    def end(self) -> None:
        if self.kind == COMPILED:
            torch._dynamo.reset()

    def truth(self, prompt: Tensor, steps: int) -> list[int] | None:
        if not any(isinstance(m, Compressed) for m in self.model.modules()):
            return None
        return greedy(_dense(self.model), prompt, steps)[0].tolist()

    def close(self) -> None:
        self.end()
        del self.model


class LlamaRunner(Runner):
    """llama.cpp on a file of one type, with the faster of its two attentions for each task."""

    def __init__(self, model: OpenELM, type: str, folder: Path) -> None:
        self.name, self.kind, self.type = f"llama.cpp {type.upper()}", LLAMA, type
        self.source = model
        self.facts: dict[str, Any] = {"attention": {}, "outside_llama_decode": {}}
        self.path = folder / f"{type}.gguf"
        export_gguf(model, self.path, type)
        start = time.perf_counter()
        self.model = llama_cpp.Model(self.path, model.config)
        self.facts |= {"load_seconds": time.perf_counter() - start, "version": self.model.version}
        self.weight_bytes = self.model.weight_bytes
        self.context: llama_cpp.Context | None = None
        self.cache_token_bytes = 4 * model.config.head_dim * sum(model.config.num_kv_heads)

    def run(self, task: Task) -> Run:
        trial = Task(task.name, task.prompts, min(task.steps, TRIAL_STEPS))
        taken, outside = {}, {}
        for flash in llama_cpp.FLASH:
            self._start(task, flash)
            run = self._work(trial)
            run()
            self.context.inside = 0.0
            taken[flash] = _seconds(run)
            outside[flash] = 1 - self.context.inside / taken[flash]
        best = min(taken, key=taken.get)
        self._start(task, best)
        self.facts["attention"][task.name] = best
        self.facts["outside_llama_decode"][task.name] = outside[best]
        return self._work(task)

    def _start(self, task: Task, flash: str) -> None:
        self.end()
        self.context = llama_cpp.Context(self.model, task.length, task.prompts.shape[0], flash)

    def _work(self, task: Task) -> Run:
        context, rows = self.context, task.prompts.tolist()
        length = len(rows[0])

        def prefill() -> list[list[int]]:
            context.truncate(0)
            return [[token] for token in context.prompt(rows)]

        if not task.steps:
            return prefill
        first = [row[0] for row in prefill()]

        def decode() -> list[list[int]]:
            context.truncate(length)
            chosen = [first]
            for _ in range(task.steps):
                chosen.append(context.step(chosen[-1]))
            return [list(row) for row in zip(*chosen, strict=True)]

        return decode

    def truth(self, prompt: Tensor, steps: int) -> list[int] | None:
        if self.source.norm.weight.dtype == torch.float32 and self.type == "f32":
            return None
        model = OpenELM(self.source.config, device="meta", dtype=torch.float32)
        state = {
            name: rounded(weight, self.type if weight.dim() == 2 else "f32")
            for name, weight in self.source.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        return greedy(model, prompt, steps)[0].tolist()

    def end(self) -> None:
        if self.context is not None:
            self.context.close()
            self.context = None

    def close(self) -> None:
        self.end()
        self.model.close()
        self.path.unlink(missing_ok=True)


def compress(format: str, model: OpenELM, progress: bool = True) -> OpenELM:
    """A copy of a model in a format of ours; of plain weights it shares the Parameters."""
    ours = twin(model)
    if format == "packed12":
        pack(ours, progress=progress)
    elif format in ("int8", "int4"):
        quantize(ours, int(format[3:]), 64, progress=progress)
    return ours


def our_runner(
    format: str, model: OpenELM, folder: Path, prompt: Tensor, backend: str | None
) -> TorchRunner:
    """Accelerated, and how long a saved folder takes to its first token after a prompt."""
    ours = compress(format, model)
    saved = folder / format
    ours.save_pretrained(saved)
    try:
        start = time.perf_counter()
        loaded = OpenELM.from_pretrained(saved)
        mapped = time.perf_counter()
        accelerate(loaded, backend=backend)
        ready = time.perf_counter()
        greedy(loaded, prompt, 1)
        end = time.perf_counter()
        del loaded
    finally:
        _remove(saved)
    accelerate(ours, backend=backend)
    runner = TorchRunner(f"ours {format}", OURS, ours)
    runner.facts |= {
        "load_seconds": mapped - start,
        "accelerate_seconds": ready - mapped,
        "prompt_seconds": end - ready,
        "first_token_seconds": end - start,
    }
    return runner


def _remove(folder: Path) -> None:
    for name in os.listdir(folder):
        (folder / name).unlink()
    folder.rmdir()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _weight_bytes(model: OpenELM) -> int:
    """Every weight once; of an embedding that is no output projection a row, which is nothing."""
    weights = decoder_weights_of(model)
    total = weights.head.nbytes + weights.norm.nbytes
    for layer in weights.layers:
        total += sum(w.nbytes for w in layer if hasattr(w, "nbytes"))
    return total


def reading(runner: Runner) -> tuple[Callable[[], object], int] | None:
    """torch's own read of the very bytes that a runner of ours reads, and how many."""
    if runner.kind != OURS:
        return None
    known = decoder_weights_of(runner.model)
    weights = [w for layer in known.layers for w in layer[:8] if w is not None] + [known.head]
    tensors = [
        t
        for w in weights
        for t in ([w] if isinstance(w, Tensor) else vars(w).values())
        if isinstance(t, Tensor) and t.nbytes >= 1 << 12
    ]
    floats = [t.flatten().view(torch.uint8) for t in tensors]
    floats = [t[: t.numel() // 4 * 4].view(torch.float32) for t in floats]

    def read() -> None:
        for t in floats:
            t.sum()

    return read, sum(t.nbytes for t in floats)


def _dense(model: OpenELM) -> OpenELM:
    """The reference model of the weights that a compressed one stands for."""
    eager = twin(model)

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Compressed):
            return None
        return plain(module, dense_weight(module), eager.config.padding_index)

    if is_accelerated(eager):
        restore(eager)
    convert(eager, True, "dense", lambda name, module: None, make, False)
    return eager
