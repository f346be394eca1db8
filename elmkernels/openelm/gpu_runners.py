"""Those that decode and read prompts side by side on a GPU, beside the runners of the race."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import SDPA
from .fair import FairOpenELM
from .graph import BUCKET, GraphDecoder
from .model import OpenELM
from .proof import twin
from .runners import COMPILED, EAGER, OURS, Run, Runner, Task

FAIR, COMPILED_FAIR, GRAPH = "fair eager", "compiled", "swapped, graph"
SDPA_GRAPH = f"{GRAPH}, {SDPA}"
# Names of rivals that hold other weights: their tokens are not compared.
OLMO, COMPILED_OLMO = "OLMo-1B eager", "OLMo-1B compiled"


def room_for(task: Task, model: OpenELM) -> int:
    """The slots of a static cache: a whole number of what masks are aligned to, where it fits."""
    wanted = -(-(task.length + 1) // (BUCKET // 2)) * (BUCKET // 2)
    return min(wanted, model.config.rope_max_length)


class FairRunner(Runner):
    """`FairOpenELM`; options: those of `torch.compile`, None for eager."""

    def __init__(self, model: OpenELM, options: dict[str, Any] | None = None) -> None:
        self.model, self.options = model, options
        self.name = FAIR if options is None else COMPILED_FAIR
        self.kind, self.facts = EAGER if options is None else COMPILED, {}

    def run(self, task: Task) -> Run:
        """Compiled for the shapes of this task alone, when it is called first."""
        prompts, length = task.prompts, task.prompts.shape[1]
        fair = FairOpenELM(self.model, prompts.shape[0], room_for(task, self.model))
        positions = torch.arange(length, device=prompts.device)
        call = self._compiled(fair)

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            return call(prompts, positions).argmax(-1)[:, None].tolist()

        if not task.steps:
            return prefill
        with torch.inference_mode():
            first = fair(prompts, positions).argmax(-1)

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

    def _compiled(self, fair: FairOpenELM) -> Callable:
        if self.options is None:
            return fair
        return torch.compile(fair, fullgraph=True, dynamic=False, **self.options)


class GraphRunner(Runner):
    """`GraphDecoder` of a swapped model; captured: False, as on a CPU, calls its step instead.
    attention: the backend of that op, None for the model's own choice.
    """

    def __init__(self, model: OpenELM, captured: bool, attention: str | None = None) -> None:
        self.name, self.kind, self.facts = GRAPH, OURS, {}
        if attention is not None:
            self.name, model = f"{GRAPH}, {attention}", twin(model)
            for layer in model.layers:
                layer.attn.attention_backend = attention
        self.model, self.captured = model, captured

    def run(self, task: Task) -> Run:
        """The decoding of a task; its graphs are captured by the first call."""
        batch, length = task.prompts.shape
        room = room_for(task, self.model)
        decoder = GraphDecoder(self.model, batch, room, captured=self.captured)
        first = decoder.prompt(task.prompts)

        def decode() -> list[list[int]]:
            decoder.rewind(length, first)
            return torch.cat((first[:, None], decoder.decode(task.steps)), 1).tolist()

        return decode
