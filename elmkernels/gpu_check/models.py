"""The models that a GPU check runs; at most KEPT of them are loaded at a time."""

import gc
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..acceleration.decode_modes import modes_of
from ..acceleration.swap import Report, accelerate
from ..backends import Reason
from ..bench.benchmark import Sizes
from ..bench.runners import compress
from ..devices import architectures, capability, missing_on
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from ..surgery import twin
from ..testing.model_parity import free_bytes
from .stages import FAILED, Found, LeftOut
from .watch import HUNG

GENERATION = "generation"  # the stage whose units named for a decode mode try it first
# Seconds after which a unit is taken to hang: models are made in it, graphs captured, kernels
# compiled. torch.compile takes its minutes; a decode mode is tried in less.
LIMIT, MODE_LIMIT, COMPILE_LIMIT = 150.0, 75.0, 420.0
KEPT = 2  # models in memory: decoding goes to and fro between two
TINY = {
    "num_transformer_layers": 2,
    "model_dim": 128,
    "num_gqa_groups": 2,
    "vocab_size": 256,
    "ffn_dim_divisor": 64,
    "rope_max_length": 512,
}


@dataclass(frozen=True)
class GpuCheckSizes(Sizes):
    """What is run: models by name, tokens that are compared, tasks, and rounds of each."""

    models: tuple[str, ...] = ("270M", "1_1B")
    large: tuple[str, ...] = ("3B",)
    compared: int = 256
    prefill: tuple[int, ...] = (512, 2048)
    contexts: tuple[int, ...] = (128, 1024, 2048)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    steps: int = 32
    training: int = 2048
    rounds: int = 5

    @classmethod
    def quick(cls) -> "GpuCheckSizes":
        return cls(("tiny",), (), 16, (16,), (260,), (1, 2), 4, 16, 2)


@dataclass
class Models:
    """Loaded models, KEPT of them at a time, on their device: the reference and its accelerated
    twin. results: of the whole check, for what is known of the decode modes.
    """

    device: torch.device
    quick: bool = False
    seed: int = 0
    results: Found = field(default_factory=dict)
    allowed: dict[tuple, float] = field(default_factory=dict)  # by how much two logits may differ
    _loaded: dict[tuple, tuple[OpenELM, OpenELM, Report]] = field(default_factory=dict)
    _forms: dict[tuple[str, str], OpenELM] = field(default_factory=dict)

    @property
    def sizes(self) -> GpuCheckSizes:
        return GpuCheckSizes.chosen(self.quick, {})

    def config(self, name: str) -> OpenELMConfig:
        if name == "tiny":
            return OpenELMConfig.from_name("OpenELM-270M", **TINY)
        return OpenELMConfig.from_name(f"OpenELM-{name}")

    def get(self, name: str, dtype: torch.dtype) -> tuple[OpenELM, OpenELM, Report]:
        """Both, with what accelerate did. Raises LeftOut if the device or its memory is not what
        they need.
        """
        if (name, dtype) not in self._loaded:
            config = self.config(name)
            nbytes = config.num_parameters * dtype.itemsize + (1 << 28)
            if len(self._loaded) == KEPT:
                self._drop_one()
            if self._short(nbytes):
                self.drop()
            self.need(nbytes, f"{name}'s weights")
            where = {"dtype": dtype, "device": self.device}
            model = OpenELM.from_config(config, seed=self.seed, **where).eval()
            accelerated = twin(model)
            report = accelerate(accelerated)
            self._loaded[name, dtype] = model, accelerated, report
        return self._loaded[name, dtype]

    def compressed(self, name: str, form: str) -> OpenELM:
        """The bfloat16 model with its weights in another form, accelerated."""
        if (name, form) not in self._forms:
            ours = compress(form, self.get(name, torch.bfloat16)[0], progress=False)
            accelerate(ours)
            self._forms[name, form] = ours
        return self._forms[name, form]

    def missing(self, mode: str, model: OpenELM, trial: bool = False) -> Reason | None:
        """Why a model isn't decoded in one of the modes here, or None. trial: to see its tokens, as
        long as it never hung; to be timed it must not have failed in bfloat16 either.
        """
        if self.device.type == "cuda" and (why := modes_of(model, self.device)[mode]):
            return why
        units = self.results.get("stages", {}).get(GENERATION, {}).get("units", {})
        bad = {n: u for n, u in units.items() if n.endswith(mode) and u["state"] == FAILED}
        for name, unit in bad.items():
            if unit["error"].startswith(HUNG) or (not trial and "bfloat16" in name):
                return f"it failed as {name!r}: {unit['error']}"
        return None

    def drop(self) -> None:
        """Let go of all, and of the memory that torch keeps."""
        self._loaded.clear()
        self._forms.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop_one(self) -> None:
        """Let go of the model that was made first, and of its other forms."""
        name, dtype = next(iter(self._loaded))
        del self._loaded[name, dtype]
        if dtype == torch.bfloat16:
            self._forms = {key: m for key, m in self._forms.items() if key[0] != name}
        gc.collect()

    def _short(self, nbytes: float) -> int | None:
        """The bytes that are free, if they are too few."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        free = free_bytes(self.device)
        return free if free is not None and nbytes > free else None

    def need(self, nbytes: float, what: str) -> None:
        """Raise LeftOut for a device that can't run the kernels, or lacks so much free memory."""
        why = missing_on("triton", capability(self.device), architectures())
        if why:
            raise LeftOut(why)
        free = self._short(nbytes)
        if free is not None:
            raise LeftOut(f"{what} need {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free")

    def tokens(self, config: OpenELMConfig, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        return ids.to(self.device)
