"""Whole models as units of a check under a clock: the same tokens, then time beside rivals."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import SDPA
from ..gpu import architectures, capability, unfit
from ..ops.decode_step import MAX_BATCH
from ..testing.device import datasheet, gpu_name
from ..testing.stages import FAILED, Clock, Found, LeftOut, Unit, first_line
from ..testing.watch import HUNG
from . import olmo, speed, step_race
from .config import OpenELMConfig
from .gpu_runners import (
    COMPILED_FAIR,
    COMPILED_OLMO,
    GRAPH,
    OLMO,
    ONE_LAUNCH,
    OTHER_FORMS,
    QUANTISED,
    SDPA_GRAPH,
    DecoderRunner,
    FairRunner,
)  # fmt: skip
from .model import OpenELM
from .proof import free_bytes, twin
from .runners import EAGER, OURS, Run, Runner, Task, TorchRunner, compress
from .swap import Report, accelerate
from .ways import GRAPH as BY_GRAPH
from .ways import ONE_LAUNCH as BY_ONE_LAUNCH
from .ways import ways

GENERATION = "generation"  # the stage whose units named for a way of decoding try it first
# Seconds after which a unit is taken to hang: models are made in it, graphs captured, kernels
# compiled. torch.compile takes its minutes; a way of decoding is tried in less.
LIMIT, WAY_LIMIT, COMPILE_LIMIT = 150.0, 75.0, 420.0
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
class Sizes:
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


QUICK = Sizes(("tiny",), (), 16, (16,), (260,), (1, 2), 4, 16, 2)


@dataclass
class Models:
    """The models that are looked at, KEPT of them at a time, on their device: the reference and its
    swapped twin. results: of the whole check, for what is known of the ways of decoding.
    """

    device: torch.device
    quick: bool = False
    seed: int = 0
    results: Found = field(default_factory=dict)
    allowed: dict[tuple, float] = field(default_factory=dict)  # by how much two logits may differ
    _held: dict[tuple, tuple[OpenELM, OpenELM, Report]] = field(default_factory=dict)
    _forms: dict[tuple[str, str], OpenELM] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else Sizes()

    def config(self, name: str) -> OpenELMConfig:
        if name == "tiny":
            return OpenELMConfig.from_name("OpenELM-270M", **TINY)
        return OpenELMConfig.from_name(f"OpenELM-{name}")

    def get(self, name: str, dtype: torch.dtype) -> tuple[OpenELM, OpenELM, Report]:
        """Both, with what accelerate did. Raises LeftOut where the device or its memory is not
        what they need."""
        if (name, dtype) not in self._held:
            config = self.config(name)
            nbytes = config.num_parameters * dtype.itemsize + (1 << 28)
            if len(self._held) == KEPT:
                self._drop_one()
            if self._short(nbytes):
                self.drop()
            self.need(nbytes, f"{name}'s weights")
            where = {"dtype": dtype, "device": self.device}
            model = OpenELM.from_config(config, seed=self.seed, **where).eval()
            swapped = twin(model)
            report = accelerate(swapped)
            self._held[name, dtype] = model, swapped, report
        return self._held[name, dtype]

    def compressed(self, name: str, form: str) -> OpenELM:
        """The bfloat16 model with its weights in another form, swapped."""
        if (name, form) not in self._forms:
            ours = compress(form, self.get(name, torch.bfloat16)[0], progress=False)
            accelerate(ours)
            self._forms[name, form] = ours
        return self._forms[name, form]

    def lacks(self, way: str, model: OpenELM, trial: bool = False) -> str | None:
        """Why a model isn't decoded in one of the ways here, or None. trial: to see its tokens, as
        long as it never hung; to be timed it must not have failed in bfloat16 either.
        """
        if self.device.type == "cuda" and (why := ways(model, self.device)[way]):
            return why
        units = self.results.get("stages", {}).get(GENERATION, {}).get("units", {})
        bad = {n: u for n, u in units.items() if n.endswith(way) and u["state"] == FAILED}
        for name, unit in bad.items():
            if unit["error"].startswith(HUNG) or (not trial and "bfloat16" in name):
                return f"it failed as {name!r}: {unit['error']}"
        return None

    def drop(self) -> None:
        """Let go of all, and of the memory that torch keeps."""
        self._held.clear()
        self._forms.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop_one(self) -> None:
        """Let go of the model that was made first, and of its other forms."""
        name, dtype = next(iter(self._held))
        del self._held[name, dtype]
        if dtype == torch.bfloat16:
            self._forms = {key: m for key, m in self._forms.items() if key[0] != name}
        gc.collect()

    def _short(self, nbytes: float) -> int | None:
        """The bytes that are free, where they are too few."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        free = free_bytes(self.device)
        return free if free is not None and nbytes > free else None

    def need(self, nbytes: float, what: str) -> None:
        """Raise LeftOut for a device that can't run the kernels, or lacks so much free memory."""
        why = unfit("triton", capability(self.device), architectures())
        if why:
            raise LeftOut(why)
        free = self._short(nbytes)
        if free is not None:
            raise LeftOut(f"{what} need {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free")

    def tokens(self, config: OpenELMConfig, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        return ids.to(self.device)


def _work(config: OpenELMConfig, task: Task, dtype: torch.dtype) -> tuple[float, str]:
    """The least work of a task, in the unit of what bounds it."""
    batch, length = task.prompts.shape
    if not task.steps:
        operations = speed.matmul_operations(config, length, 1, training=False)
        return batch * operations, speed.PRODUCTS
    past = batch * (length + task.steps / 2)
    return task.steps * speed.token_bytes(config, dtype, past), speed.MEMORY


def _caches(config: OpenELMConfig, task: Task, dtype: torch.dtype) -> float:
    """About the bytes of ten runners' caches, and of a prompt on its way through a layer."""
    tokens = task.prompts.shape[0] * (task.length + 128)
    cache = 2 * config.head_dim * sum(config.num_kv_heads) * tokens
    layer = (4 * max(config.ffn_dims) + 8 * config.model_dim) * tokens
    return (10 * cache + layer) * dtype.itemsize


Makers = dict[str, Callable[[], Runner]]
OTHER_WEIGHTS = (
    EAGER,
    OLMO,
    COMPILED_OLMO,
    *QUANTISED,
)  # whose tokens aren't compared with eager's
# About the seconds that torch.compile takes, which nothing can stop once it has begun.
COMPILE_SECONDS = {COMPILED_FAIR: 60.0, COMPILED_OLMO: 40.0, "a training step": 60.0}


def _lacks_time(models: Models, what: str, clock: Clock) -> str | None:
    """Why there is no time for something, or None."""
    needed = 0.0 if models.quick else COMPILE_SECONDS.get(what, 0.0)
    left = clock.left()
    return None if left > needed else f"no time: about {needed:.0f} s needed, {left:.0f} left"


def _decoders(models: Models, name: str, task: Task, forms: bool) -> Makers:
    """What decodes a task without waiting for the host; forms: also of the weights' other forms."""
    captured = models.device.type == "cuda"
    swapped = models.get(name, torch.bfloat16)[1]

    def by(
        runner: str, way: str, form: str | None = None, attention: str | None = None
    ) -> Callable[[], Runner]:
        def make() -> Runner:
            if why := models.lacks(way, swapped):
                raise LeftOut(why)
            model = swapped if form is None else models.compressed(name, form)
            return DecoderRunner(runner, model, way, captured, attention)

        return make

    found = {GRAPH: by(GRAPH, BY_GRAPH), SDPA_GRAPH: by(SDPA_GRAPH, BY_GRAPH, attention=SDPA)}
    if task.prompts.shape[0] <= MAX_BATCH:
        found[ONE_LAUNCH] = by(ONE_LAUNCH, BY_ONE_LAUNCH)
        for form, runner in OTHER_FORMS.items() if forms else ():
            found[runner] = by(runner, BY_ONE_LAUNCH, form)
    return found


def _race(
    models: Models, name: str, task: Task, more: Callable[[OpenELM], Makers], forms: bool,
    found: Found, clock: Clock,
) -> None:  # fmt: skip
    """A task by the reference, the swapped model and rivals; what can't be had is named."""
    dtype = torch.bfloat16
    eager, swapped, _ = models.get(name, dtype)
    models.need(_caches(eager.config, task, dtype), f"caches for {task.name}")
    torch.compiler.reset()  # what other tasks were compiled for is never called again
    makers: Makers = {EAGER: lambda: TorchRunner(EAGER, EAGER, eager)}
    makers[speed.SWAPPED] = lambda: TorchRunner(speed.SWAPPED, OURS, swapped)
    own = len(makers)
    rivals: Makers = {"fair": lambda: FairRunner(eager)}
    if task.steps:
        rivals |= _decoders(models, name, task, forms)
    runs, tokens, missing = {}, {}, {}
    found |= {"model": name, "ok": True, "missing": missing, "steps": task.steps}
    found |= dict(zip(("batch", "context"), task.prompts.shape, strict=True))
    for i, (key, make) in enumerate((makers | rivals | more(eager)).items()):
        if i >= own and (why := _lacks_time(models, key, clock)):
            missing[key] = why
            continue
        try:
            runner = make()
            run = runner.run(task)
            tokens[runner.name] = run()
            runs[runner.name] = run
        except Exception as error:  # compilers and other people's libraries raise anything
            if i < own:
                raise
            missing[key] = first_line(error)
    compared = [n for n in tokens if n not in OTHER_WEIGHTS]
    found["agree"] = {n: agreement(tokens[EAGER], tokens[n]) for n in compared}
    found["tokens_each"] = 1 + task.steps
    _measure(models, task, runs, _work(eager.config, task, dtype), dtype, found)


def agreement(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows share from their start."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(expected, got, strict=True)
    ]
    return min(equal)


def _measure(
    models: Models, task: Task, runs: dict[str, Run], work: tuple[float, str],
    dtype: torch.dtype, found: Found,
) -> None:  # fmt: skip
    amount, bound = work
    measured = speed.measure_tasks(
        task.name, task.tokens, runs, amount, bound, dtype, task.prompts,
        models.sizes.rounds, models.quick, peaks=models.device.type == "cuda",
    )  # fmt: skip
    found |= measured.json()
    found |= floors(measured, models.device)


def floors(measured: speed.Measured, device: torch.device) -> dict[str, Any]:
    """Tokens a second at the measured ceiling, and at what the GPU's maker promises (None where
    that isn't known)."""
    promised = datasheet(gpu_name(device))
    top = None
    if promised is not None:
        rate = promised.bandwidth if measured.bound == speed.MEMORY else promised.bf16
        top = measured.tokens / (measured.work / rate)
    return {"floor_tokens": measured.tokens / measured.floor, "datasheet_tokens": top}


def _none(model: OpenELM) -> Makers:
    return {}


def _task(models: Models, config: OpenELMConfig, batch: int, length: int, steps: int) -> Task:
    room = config.rope_max_length
    if length + steps + 1 > room:
        raise LeftOut(f"the model has {room} positions, {length + steps + 1} needed")
    name = f"decode {steps} after {length}, batch {batch}" if steps else f"prefill {length}"
    return Task(name, models.tokens(config, batch, length), steps)


def _race_unit(
    models: Models, name: str, batch: int, length: int, steps: int,
    more: Callable[[OpenELM], Makers] = _none, suffix: str = "", forms: bool = False,
    limit: float = LIMIT,
) -> Unit:  # fmt: skip
    def run(found: Found, clock: Clock) -> None:
        task = _task(models, models.config(name), batch, length, steps)
        _race(models, name, task, more, forms, found, clock)

    what = f"decode at {length} x {batch}" if steps else f"prefill {length}"
    return Unit(f"{name} {what}{suffix}", run, limit)


def decode_units(models: Models) -> list[Unit]:
    """Decoding of few sequences by every way and form of weights: the largest model's first, as it
    is what the last stage left on the device; one sequence after a short prompt before the rest.
    """
    s = models.sizes
    names = s.models[::-1]
    few = [b for b in s.batches if b <= MAX_BATCH]
    grid = [(b, c) for b in few for c in s.contexts]
    first = [(name, *grid[0]) for name in names]
    rest = [(name, b, c) for name in names for b, c in grid[1:]]
    return [_race_unit(models, n, b, c, s.steps, forms=True) for n, b, c in first + rest]


def model_units(models: Models) -> list[Unit]:
    """Prompts and training steps of each model, then the grid of many sequences and contexts."""
    s = models.sizes
    units = []
    for name in s.models:
        units += [_race_unit(models, name, 1, length, 0) for length in s.prefill]
        units.append(_training_unit(models, name, False))
    for name in s.models:
        grid = [(b, c) for c in s.contexts for b in s.batches if b > MAX_BATCH]
        units += [_race_unit(models, name, batch, context, s.steps) for batch, context in grid]
    return units


def compiled_units(models: Models) -> list[Unit]:
    """What takes a compiler minutes, the paper's rival, and what only fits if time is left."""
    s = models.sizes
    options = {"backend": "eager"} if models.quick else {"mode": "reduce-overhead"}

    def compiled(model: OpenELM) -> Makers:
        return {COMPILED_FAIR: lambda: FairRunner(model, options)}

    def with_olmo(model: OpenELM) -> Makers:
        shape = olmo.TINY if models.quick else olmo.SHAPE
        built: list[Any] = []

        def runner(name: str, options: dict[str, Any] | None) -> Runner:
            if not built:
                built.append(olmo.build(shape, torch.bfloat16, models.device))
            return olmo.OlmoRunner(name, built[0], options)

        rivals = {OLMO: lambda: runner(OLMO, None)} | compiled(model)
        return rivals | {COMPILED_OLMO: lambda: runner(COMPILED_OLMO, options)}

    context, steps = s.contexts[0], s.steps
    long = {"limit": COMPILE_LIMIT}
    olmo_too = ", compiled and OLMo"
    more = [_race_unit(models, s.models[-1], 1, context, steps, with_olmo, olmo_too, **long)]
    more += [
        _race_unit(models, name, 1, context, steps, compiled, ", compiled", **long)
        for name in s.models[:-1]
    ]
    more += [_race_unit(models, name, 1, context, steps) for name in s.large]
    return [*more, *([] if models.quick else [_training_unit(models, s.models[0], True)])]


def _training_unit(models: Models, name: str, compiled: bool) -> Unit:
    def run(found: Found, clock: Clock) -> None:
        if compiled and (why := _lacks_time(models, "a training step", clock)):
            raise LeftOut(why)
        models.drop()
        config, tokens = models.config(name), models.sizes.training
        # Float32 weights and gradients of two models, and the logits a few times over.
        models.need(
            16 * config.num_parameters + 24 * tokens * config.vocab_size + (1 << 28),
            f"{name}'s training step",
        )
        sizes = step_race.Sizes(tokens, 1, models.sizes.rounds)
        race = step_race.StepRace(
            config, ("bf16",), sizes, compiled, device=models.device, memory=False
        )
        results = step_race.start(race)
        quiet = lambda text: None  # noqa: E731
        step_race.run(race, results, quiet, quiet)
        found |= {"model": name, "missing": {}, "ok": bool(results["parity"])}
        found |= results["precisions"]["bf16"]
        promised = datasheet(gpu_name(models.device))
        top = None if promised is None else tokens / (found["work"] / promised.bf16)
        found |= {"floor_tokens": tokens / found["floor"], "datasheet_tokens": top}

    suffix = ", compiled" if compiled else ""
    limit = COMPILE_LIMIT if compiled else LIMIT
    return Unit(f"{name} training step {models.sizes.training}{suffix}", run, limit)
