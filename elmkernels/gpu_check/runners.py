"""Runners for a GPU: torch's own operations as a baseline, and the decode modes of the accelerated
model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..acceleration.routines import Plan
from ..acceleration.swap import accelerate
from ..backends import SDPA
from ..bench.baselines.torch_baseline import TorchBaseline
from ..bench.benchmark import ACCELERATED, COMPILED, EAGER, OURS, TORCH
from ..bench.runners import Run, Runner, Task
from ..generation.cuda_graph import BUCKET
from ..generation.gpu_decoder import Decoder
from ..generation.sampling import Sampler, Sampling
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..surgery import twin

GRAPH = f"{ACCELERATED}, graph"
SDPA_GRAPH, CUBLAS_GRAPH = f"{GRAPH}, {SDPA}", f"{GRAPH}, cuBLAS"
ONE_LAUNCH = f"{ACCELERATED}, one launch"
# The same with weights in other forms, by the names of `runners.compress`. Only packed12 holds the
# same values.
OTHER_FORMS = {form: f"{ONE_LAUNCH}, {form}" for form in ("int8", "int4", "packed12")}
QUANTIZED = (OTHER_FORMS["int8"], OTHER_FORMS["int4"])
# Names of baselines that hold other weights: their tokens are not compared.
OLMO, COMPILED_OLMO = "OLMo-1B eager", "OLMo-1B compiled"


def room_for(task: Task, model: OpenELM) -> int:
    """The slots of a static cache: a whole number of what masks are aligned to, if it fits."""
    wanted = -(-(task.length + 1) // (BUCKET // 2)) * (BUCKET // 2)
    return min(wanted, model.config.rope_max_length)


class TorchBaselineRunner(Runner):
    """`TorchBaseline`; options: those of `torch.compile`, None for eager."""

    def __init__(self, model: OpenELM, options: dict[str, Any] | None = None) -> None:
        self.model, self.options = model, options
        self.name = TORCH if options is None else COMPILED
        self.kind, self.facts = EAGER if options is None else COMPILED, {}

    def run(self, task: Task) -> Run:
        """Compiled for the shapes of this task alone, when it is called first."""
        prompts, length = task.prompts, task.prompts.shape[1]
        baseline = TorchBaseline(self.model, prompts.shape[0], room_for(task, self.model))
        positions = torch.arange(length, device=prompts.device)
        call = self._compiled(baseline)

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            return call(prompts, positions).argmax(-1)[:, None].tolist()

        if not task.steps:
            return prefill
        with torch.inference_mode():
            first = baseline(prompts, positions).argmax(-1)

        @torch.inference_mode()
        def decode() -> list[list[int]]:
            at, chosen = positions[-1:] + 1, [first]
            for i in range(task.steps):
                seen = None if self.options is not None else length + i + 1
                chosen.append(self._next(call, chosen[-1], at, seen))
                at += 1
            return torch.stack(chosen, 1).tolist()

        return decode

    def _next(self, call: Callable, tokens: Tensor, at: Tensor, seen: int | None) -> Tensor:
        if self.options is not None:
            torch.compiler.cudagraph_mark_step_begin()
        return call(tokens[:, None], at, seen).argmax(-1)

    def _compiled(self, baseline: TorchBaseline) -> Callable:
        if self.options is None:
            return baseline
        return torch.compile(baseline, fullgraph=True, dynamic=False, **self.options)


def with_sdpa(model: OpenELM) -> OpenELM:
    """An accelerated model's twin with torch's attention."""
    model = twin(model)
    for layer in model.layers:
        layer.attn.attention_backend = SDPA
    return model


def with_cublas(model: OpenELM) -> OpenELM:
    """An accelerated model's twin whose products are torch's, for few rows too."""
    model = twin(model)
    accelerate(model, plan=Plan(streamed=False))
    return model


class DecoderRunner(Runner):
    """An accelerated model in one decode mode. captured: False, as on a CPU, calls the same steps
    without a CUDA graph.
    """

    def __init__(self, name: str, model: OpenELM, mode: str, captured: bool) -> None:
        self.name, self.kind, self.facts = name, OURS, {}
        self.model, self.mode, self.captured = model, mode, captured

    def run(self, task: Task) -> Run:
        """The decoding of a task; what it needs is captured by the first call."""
        prompts, steps = task.prompts, task.steps + 1
        batch, length = prompts.shape
        room, device = room_for(task, self.model), prompts.device
        dtype = self.model.activation_dtype
        cache = KVCache(self.model.config, batch, room, dtype=dtype, device=device)
        decoder = Decoder(self.model, cache, self.mode, captured=self.captured)
        with torch.inference_mode():
            logits = self.model(prompts, cache=cache, logits_to_keep=1)[:, -1]
        prompted = [[]] * batch
        sampler = Sampler(Sampling(), prompted, self.model.config.vocab_size, device, steps)

        def decode() -> list[list[int]]:
            cache.truncate(length)
            decoder.begin(logits, sampler, steps)
            return decoder.rest().tolist()

        return decode
