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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..acceleration.decoder_weights import decoder_weights_of
from ..acceleration.swap import accelerate, restore
from ..compression.conversion import convert, dense_weight, plain
from ..compression.packing import pack
from ..compression.quantization import quantize
from ..generation.sampling import argmax
from ..generation.session import Session
from ..generation.step import greedy, next_logits
from ..openelm.cache import KVCache
from ..openelm.compressed import Compressed
from ..openelm.gguf import export_gguf, rounded
from ..openelm.model import OpenELM
from ..surgery import is_accelerated, twin
from ..testing.rounding import rounding_loss
from .baselines import llama_cpp
from .baselines.apart import Apart, Died
from .benchmark import COMPILED, LLAMA, OURS
from .roofline import peak

T = TypeVar("T")


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

    def peak(self, run: Run) -> int | None:
        """Bytes that a run needs at its highest; None if that can't be watched."""
        return peak(run, torch.device("cpu"))

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
                return argmax(call(token[:, None], cache=cache, logits_to_keep=1)[:, -1])
            return argmax(next_logits(model, token, cache))

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


class DraftRunner(TorchRunner):
    """An accelerated model that checks what a draft guesses. A token doesn't read all weights, so
    weight_bytes is 0. facts: what was guessed and kept, of each task's last run.
    """

    def __init__(self, name: str, model: OpenELM, draft: str | OpenELM) -> None:
        super().__init__(name, OURS, model)
        self.draft, self.weight_bytes = draft, 0
        self.facts["speculation"] = {}

    def run(self, task: Task) -> Run:
        if not task.steps:
            return super().run(task)
        room = min(task.length + 1, self.model.config.rope_max_length)
        session = Session(self.model, len(task.prompts), room, draft=self.draft)
        first = session.generate(task.prompts, 1, stop_tokens=())
        chosen = [row.tokens[0] for row in first]
        # The session holds the prompts: the one token that isn't there is the first step.
        prompts = [[*p, t] for p, t in zip(task.prompts.tolist(), chosen, strict=True)]

        def decode() -> list[list[int]]:
            stream = session.stream(prompts, task.steps, stop_tokens=())
            for _ in stream:
                pass
            if stream.speculation is not None:
                self.facts["speculation"][task.name] = stream.speculation.results()
            return [[t, *row.tokens] for t, row in zip(chosen, stream.rows, strict=True)]

        return decode


class LlamaRunner(Runner):
    """llama.cpp on a file of one type, in a process of its own, with the faster of its two
    attentions for each task.

    Where it dies, it is tried again without its extra buffers: the products of quantised weights by
    tile instructions die of an illegal one on some processors. `facts` says so.
    """

    def __init__(self, model: OpenELM, type: str, folder: Path) -> None:
        self.name, self.kind, self.type = f"llama.cpp {type.upper()}", LLAMA, type
        self.source = model
        self.facts = {"attention": {}, "outside_llama_decode": {}, "extra_buffers": "on"}
        self.path = folder / f"{type}.gguf"
        export_gguf(model, self.path, type)
        self.session: Apart | None = None
        self._again(self._start)
        self.cache_token_bytes = 4 * model.config.head_dim * sum(model.config.num_kv_heads)

    def _start(self) -> None:
        extra = self.facts["extra_buffers"] == "on"
        arguments = self.path, self.source.config, torch.get_num_threads(), extra
        self.session = Apart(f"{llama_cpp.__name__}:Session", *arguments)
        about = self.session.call("about")
        self.weight_bytes = about.pop("weight_bytes")
        self.facts |= about

    def _again(self, work: Callable[[], T]) -> T:
        """What work gives, the second time without extra buffers, if it dies the first."""
        try:
            return work()
        except Died as error:
            if self.facts["extra_buffers"] != "on":
                raise
            self._quit()
            self.facts["extra_buffers"] = f"off, with them it {error}"
            try:
                if work != self._start:
                    self._start()
                return work()
            except RuntimeError as second:
                raise type(second)(f"{error}; without extra buffers: {second}") from second

    def run(self, task: Task) -> Run:
        rows = task.prompts.tolist()

        def prepare() -> None:
            if self.session is None:  # it has died in the task before
                self._start()
            best, outside = self.session.call("prepare", rows, task.steps)
            self.facts["attention"][task.name] = best
            self.facts["outside_llama_decode"][task.name] = outside

        self._again(prepare)
        return self._run

    def _run(self) -> list[list[int]]:
        try:
            return self.session.call("run")
        except Died:
            self._quit()
            raise

    def peak(self, run: Run) -> int | None:
        return self.session.call("peak")

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
        if self.session is not None:
            try:
                self.session.call("end")
            except Died:
                self._quit()

    def _quit(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None

    def close(self) -> None:
        self._quit()
        self.path.unlink(missing_ok=True)


def compress(format: str, model: OpenELM, progress: bool = True) -> OpenELM:
    """A copy of a model in a format of ours; of plain weights it shares the Parameters."""
    ours = twin(model)
    if format == "packed12":
        pack(ours, progress=progress)
    elif format in ("int8", "int4"):
        quantize(ours, int(format[3:]), 64, progress=progress)
    return ours


ROUNDED = ("int8", "int4")  # formats whose activations may be rounded


def rounded_runner(format: str, model: OpenELM, tokens: int, backend: str | None) -> TorchRunner:
    """Accelerated, with activations that are rounded to 8 bits, and what that loses."""
    ours = compress(format, model, progress=False)
    accelerate(ours, backend=backend, activations="int8")
    runner = TorchRunner(f"ours {format}, int8 activations", OURS, ours)
    runner.facts["rounding"] = rounding_loss(ours, tokens)
    return runner


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


def _weight_bytes(model: OpenELM) -> int:
    """Every weight once; of an embedding that is no output projection a row, which is nothing."""
    weights = decoder_weights_of(model)
    total = weights.head.nbytes + weights.norm.nbytes
    for layer in weights.layers:
        total += sum(w.nbytes for w in layer if hasattr(w, "nbytes"))
    return total


def reading(runner: Runner) -> tuple[Callable[[], object], int] | None:
    """torch's own read of the very bytes that a runner of ours reads, and how many."""
    if runner.kind != OURS or not runner.weight_bytes:
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
