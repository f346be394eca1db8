"""Runners for a GPU: the decode modes of the accelerated model."""

import torch

from ..acceleration.routines import Plan
from ..acceleration.swap import accelerate
from ..backends import SDPA
from ..bench.baselines.torch_baseline import room_for
from ..bench.benchmark import ACCELERATED, OURS
from ..bench.runners import Run, Runner, Task
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
