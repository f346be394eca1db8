"""Whole models as units of a check under a clock: the same tokens, then time beside baselines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..acceleration import decode_modes
from ..backends import Reason
from ..bench.baselines import peers
from ..bench.baselines.torch_baseline import TorchBaselineRunner
from ..bench.benchmark import ACCELERATED, COMPILED, EAGER, OURS
from ..bench.roofline import MEMORY, PRODUCTS, Measured, Work, measure_tasks
from ..bench.runners import Runner, Task, TorchRunner
from ..bench.training_step import StepSizes, TrainingStep
from ..openelm.config import OpenELMConfig
from ..openelm.costs import matmul_operations, token_bytes
from ..openelm.model import OpenELM
from ..ops.decode_step import MAX_BATCH
from ..ops.linear import MAX_ROWS
from .gpu_facts import datasheet, gpu_name
from .models import COMPILE_LIMIT, LIMIT, Models
from .runners import (
    COMPILED_OLMO,
    CUBLAS_GRAPH,
    GRAPH,
    OLMO,
    ONE_LAUNCH,
    OTHER_FORMS,
    QUANTIZED,
    SDPA_GRAPH,
    DecoderRunner,
    with_cublas,
    with_sdpa,
)
from .stages import Clock, Found, LeftOut, Unit, first_line


def _work(config: OpenELMConfig, task: Task, dtype: torch.dtype) -> Work:
    """The least work of a task."""
    batch, length = task.prompts.shape
    if not task.steps:
        operations = batch * matmul_operations(config, length, 1, training=False)
        return Work(task.name, task.tokens, operations, PRODUCTS, dtype)
    past = batch * (length + task.steps / 2)
    nbytes = task.steps * token_bytes(config, dtype, past)
    return Work(task.name, task.tokens, nbytes, MEMORY, dtype)


def _caches(config: OpenELMConfig, task: Task, dtype: torch.dtype) -> float:
    """About the bytes of ten runners' caches, and of a prompt on its way through a layer."""
    tokens = task.prompts.shape[0] * (task.length + 128)
    cache = 2 * config.head_dim * sum(config.num_kv_heads) * tokens
    layer = (4 * max(config.ffn_dims) + 8 * config.model_dim) * tokens
    return (10 * cache + layer) * dtype.itemsize


Makers = dict[str, Callable[[], Runner]]
NOT_COMPARED = (EAGER, OLMO, COMPILED_OLMO, *QUANTIZED)  # other weights, or the eager model itself


def _none(model: OpenELM) -> Makers:
    return {}


@dataclass(frozen=True)
class Shape:
    """What is decoded, or read if steps is 0, and by whom beside the usual runners. more: other
    baselines, named in the suffix of the unit. forms: also the weights' other forms.
    """

    batch: int
    length: int
    steps: int = 0
    more: Callable[[OpenELM], Makers] = _none
    suffix: str = ""
    forms: bool = False

    @property
    def name(self) -> str:
        what = f"decode at {self.length} x {self.batch}" if self.steps else f"prefill {self.length}"
        return f"{what}{self.suffix}"


# About the seconds that torch.compile takes, which nothing can stop once it has begun.
COMPILE_SECONDS = {COMPILED: 60.0, COMPILED_OLMO: 40.0, "a training step": 60.0}


def _missing_time(models: Models, what: str, clock: Clock) -> Reason | None:
    """Why there is no time for something, or None."""
    needed = 0.0 if models.quick else COMPILE_SECONDS.get(what, 0.0)
    left = clock.left()
    return None if left > needed else f"no time: about {needed:.0f} s needed, {left:.0f} left"


def _decoders(models: Models, name: str, task: Task, forms: bool) -> Makers:
    """What decodes a task without waiting for the host; forms: also of the weights' other forms."""
    captured = models.device.type == "cuda"
    accelerated = models.get(name, torch.bfloat16)[1]

    def by(
        runner: str, mode: str, form: str | None = None,
        changed: Callable[[OpenELM], OpenELM] = lambda model: model,
    ) -> Callable[[], Runner]:  # fmt: skip
        def make() -> Runner:
            if why := models.missing(mode, accelerated):
                raise LeftOut(why)
            model = accelerated if form is None else models.compressed(name, form)
            return DecoderRunner(runner, changed(model), mode, captured)

        return make

    found = {GRAPH: by(GRAPH, decode_modes.GRAPH)}
    found[SDPA_GRAPH] = by(SDPA_GRAPH, decode_modes.GRAPH, changed=with_sdpa)
    if task.prompts.shape[0] <= MAX_ROWS:
        found[CUBLAS_GRAPH] = by(CUBLAS_GRAPH, decode_modes.GRAPH, changed=with_cublas)
    if task.prompts.shape[0] <= MAX_BATCH:
        found[ONE_LAUNCH] = by(ONE_LAUNCH, decode_modes.ONE_LAUNCH)
        for form, runner in OTHER_FORMS.items() if forms else ():
            found[runner] = by(runner, decode_modes.ONE_LAUNCH, form)
    return found


def _compare(models: Models, name: str, shape: Shape, found: Found, clock: Clock) -> None:
    """A task by the reference, the accelerated model and baselines; what can't run is named."""
    task = _task(models, models.config(name), shape)
    dtype = torch.bfloat16
    eager, accelerated, _ = models.get(name, dtype)
    models.need(_caches(eager.config, task, dtype), f"caches for {task.name}")
    torch.compiler.reset()  # what other tasks were compiled for is never called again
    makers: Makers = {EAGER: lambda: TorchRunner(EAGER, EAGER, eager)}
    makers[ACCELERATED] = lambda: TorchRunner(ACCELERATED, OURS, accelerated)
    own = len(makers)
    baselines: Makers = {"torch": lambda: TorchBaselineRunner(eager)}
    if task.steps:
        baselines |= _decoders(models, name, task, shape.forms)
    runs, tokens, missing = {}, {}, {}
    found |= {"model": name, "ok": True, "missing": missing, "steps": task.steps}
    found |= dict(zip(("batch", "context"), task.prompts.shape, strict=True))
    for i, (key, make) in enumerate((makers | baselines | shape.more(eager)).items()):
        if i >= own and (why := _missing_time(models, key, clock)):
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
    compared = [n for n in tokens if n not in NOT_COMPARED]
    found["agree"] = {n: agreement(tokens[EAGER], tokens[n]) for n in compared}
    found["tokens_each"] = 1 + task.steps
    measured = measure_tasks(
        _work(eager.config, task, dtype),
        runs,
        models.device,
        rounds=models.sizes.rounds,
        quick=models.quick,
        peaks=models.device.type == "cuda",
    )
    found |= measured.json() | floors(measured, models.device)


def agreement(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows share from their start."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(expected, got, strict=True)
    ]
    return min(equal)


def floors(measured: Measured, device: torch.device) -> dict[str, Any]:
    """Tokens a second at the measured ceiling, and at what the GPU's maker promises (None where
    that isn't known)."""
    promised = datasheet(gpu_name(device))
    top = None
    if promised is not None:
        rate = promised.bandwidth if measured.bound == MEMORY else promised.bf16
        top = measured.tokens / (measured.work / rate)
    return {"floor_tokens": measured.tokens / measured.floor, "datasheet_tokens": top}


def _task(models: Models, config: OpenELMConfig, shape: Shape) -> Task:
    batch, length, steps, room = shape.batch, shape.length, shape.steps, config.rope_max_length
    if length + steps + 1 > room:
        raise LeftOut(f"the model has {room} positions, {length + steps + 1} needed")
    name = f"decode {steps} after {length}, batch {batch}" if steps else f"prefill {length}"
    return Task(name, models.tokens(config, batch, length), steps)


def _unit(models: Models, name: str, shape: Shape, limit: float = LIMIT) -> Unit:
    return Unit(f"{name} {shape.name}", partial(_compare, models, name, shape), limit)


def decode_units(models: Models) -> list[Unit]:
    """Decoding of few sequences by every mode and form of weights: the largest model's first, as it
    is what the last stage left on the device; one sequence after a short prompt before the rest.
    """
    s = models.sizes
    names = s.models[::-1]
    few = [b for b in s.batches if b <= MAX_BATCH]
    grid = [(b, c) for b in few for c in s.contexts]
    first = [(name, *grid[0]) for name in names]
    rest = [(name, b, c) for name in names for b, c in grid[1:]]
    return [_unit(models, n, Shape(b, c, s.steps, forms=True)) for n, b, c in first + rest]


def model_units(models: Models) -> list[Unit]:
    """Prompts and training steps of each model, then the grid of many sequences and contexts."""
    s = models.sizes
    units = []
    for name in s.models:
        units += [_unit(models, name, Shape(1, length)) for length in s.prefill]
        units.append(_training_unit(models, name, False))
    for name in s.models:
        grid = [(b, c) for c in s.contexts for b in s.batches if b > MAX_BATCH]
        units += [_unit(models, name, Shape(batch, context, s.steps)) for batch, context in grid]
    return units


def compiled_units(models: Models) -> list[Unit]:
    """What takes a compiler minutes, the paper's baseline, and what only fits if time is left."""
    s = models.sizes
    options = {"backend": "eager"} if models.quick else {"mode": "reduce-overhead"}

    def compiled(model: OpenELM) -> Makers:
        return {COMPILED: lambda: TorchBaselineRunner(model, options)}

    def with_olmo(model: OpenELM) -> Makers:
        built: list[Any] = []

        def runner(name: str, options: dict[str, Any] | None) -> Runner:
            if not built:
                place = torch.bfloat16, models.device
                built.append(peers.build(peers.OLMO, *place, tiny=models.quick))
            return peers.PeerRunner(name, built[0], options)

        baselines = {OLMO: lambda: runner(OLMO, None)} | compiled(model)
        return baselines | {COMPILED_OLMO: lambda: runner(COMPILED_OLMO, options)}

    short = (1, s.contexts[0], s.steps)
    olmo_too = Shape(*short, with_olmo, ", compiled and OLMo")
    alone = Shape(*short, compiled, ", compiled")
    more = [_unit(models, s.models[-1], olmo_too, COMPILE_LIMIT)]
    more += [_unit(models, name, alone, COMPILE_LIMIT) for name in s.models[:-1]]
    more += [_unit(models, name, Shape(*short)) for name in s.large]
    return [*more, *([] if models.quick else [_training_unit(models, s.models[0], True)])]


def _training_unit(models: Models, name: str, compiled: bool) -> Unit:
    def run(found: Found, clock: Clock) -> None:
        if compiled and (why := _missing_time(models, "a training step", clock)):
            raise LeftOut(why)
        models.drop()
        config, tokens = models.config(name), models.sizes.training
        # Float32 weights and gradients of two models, and the logits a few times over.
        models.need(
            16 * config.num_parameters + 24 * tokens * config.vocab_size + (1 << 28),
            f"{name}'s training step",
        )
        step = TrainingStep(
            config=config,
            precisions=("bf16",),
            sizes=StepSizes(tokens, 1, models.sizes.rounds),
            compiled=compiled,
            device=models.device,
            memory=False,
        )
        results = step.start()
        step.run(results)
        found |= {"model": name, "missing": {}, "ok": bool(results["parity"])}
        found |= results["precisions"]["bf16"]
        promised = datasheet(gpu_name(models.device))
        top = None if promised is None else tokens / (found["work"] / promised.bf16)
        found |= {"floor_tokens": tokens / found["floor"], "datasheet_tokens": top}

    suffix = ", compiled" if compiled else ""
    limit = COMPILE_LIMIT if compiled else LIMIT
    return Unit(f"{name} training step {models.sizes.training}{suffix}", run, limit)
