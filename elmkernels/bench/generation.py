"""Generation: whole models side by side, eager, torch.compile, ours in every format, llama.cpp.

Three tasks: the pass over a prompt for its last logits, tokens decoded one by one, and the same for
a batch. The runners of a group share one model's weights and take turns, round by round, in a
rotated order. Probes take their turn with them: how fast this machine reads memory just then, by
the fastest of several routines. The warm-up's tokens are compared with those of the eager model in
the same weights, so that correctness stands beside speed. What can't run is named with the reason.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..acceleration.swap import accelerate
from ..checks import one_line
from ..generation.drafts import LOOKUP, SELF
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from . import chart
from .baselines import llama_cpp
from .baselines.apart import Died
from .benchmark import COMPILED, EAGER, LLAMA, Benchmark, Report, Results, Sizes, headline
from .ceilings import numbers, reads
from .generation_figures import figures, own_read, text
from .runners import (
    ROUNDED,
    DraftRunner,
    LlamaRunner,
    Run,
    Runner,
    Task,
    TorchRunner,
    our_runner,
    reading,
    rounded_runner,
)
from .timing import fingerprint

CPU = torch.device("cpu")
FORMATS = ("fp32", "bf16", "packed12", "int8", "int4")
PROBE_CALLS = 3
# What building a runner raises if it can't run here.
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


@dataclass(frozen=True)
class Group:
    """Runners that are compared: our formats, whether compiled, llama.cpp's types."""

    name: str
    dtype: torch.dtype
    formats: tuple[str, ...]
    compiled: bool
    types: tuple[str, ...]


GROUPS = (
    Group("fp32", torch.float32, ("fp32",), True, ("f32",)),
    Group("16-bit", torch.bfloat16, ("bf16", "packed12"), True, ("f16", "bf16")),
    Group("int8", torch.bfloat16, ("int8",), False, ("q8_0",)),
    Group("int4", torch.bfloat16, ("int4",), False, ("q4_0",)),
)


@dataclass(frozen=True)
class GenerationSizes(Sizes):
    """Tokens of each task, rounds, tokens that are compared, bytes that a probe reads."""

    prefill: int = 512
    prompt: int = 128
    steps: int = 128
    batch: int = 4
    rounds: int = 5
    agree: int = 32
    probe: int = 1 << 29

    @classmethod
    def quick(cls) -> "GenerationSizes":
        return cls(prefill=64, prompt=16, steps=8, rounds=2, agree=8, probe=1 << 26)

    def within(self, config: OpenELMConfig) -> "GenerationSizes":
        """The same, shortened to the positions that a model has."""
        room = config.rope_max_length
        prompt = min(self.prompt, max(1, room // 2))
        steps = min(self.steps, room - prompt)
        prefill, agree = min(self.prefill, room), min(self.agree, steps + 1)
        return replace(self, prefill=prefill, prompt=prompt, steps=steps, agree=agree)


@dataclass(frozen=True, kw_only=True)
class Generation(Benchmark):
    """load: the model in a dtype; weights: where they come from, in words; drafts: by name, each
    beside every format; activations: "int8" runs quantized formats a second time, with what they
    are multiplied by rounded.
    """

    load: Callable[[torch.dtype], OpenELM]
    name: str
    weights: str
    formats: tuple[str, ...] = FORMATS
    drafts: tuple[str, ...] = ()
    sizes: GenerationSizes = GenerationSizes()
    compiled: bool = True
    backend: str | None = None
    activations: str | None = None
    seed: int = 0

    @property
    def groups(self) -> list[Group]:
        """Those with a format that was asked for, and of their formats only these."""
        wanted = [
            replace(group, formats=tuple(f for f in group.formats if f in self.formats))
            for group in GROUPS
        ]
        return [group for group in wanted if group.formats]

    @property
    def stages(self) -> int:
        tasks = 2 + (self.sizes.batch > 1)
        ours = 1 + len(self.drafts)
        runners = [
            1 + g.compiled + ours * len(g.formats) + len(self.rounded(g)) + len(g.types)
            for g in self.groups
        ]
        return sum(1 + n + tasks * (n + self.sizes.rounds) for n in runners)

    def rounded(self, group: Group) -> list[str]:
        """The formats that are also run with rounded activations."""
        return [f for f in group.formats if f in ROUNDED and self.activations is not None]

    def describe(self) -> Results:
        return {
            "command": "bench generate",
            "model": self.name,
            "weights": self.weights,
            "machine": fingerprint(CPU),
            "backend": self.backend,
            "activations": self.activations,
            "seed": self.seed,
            "groups": {},
        }

    def measure(self, results: Results, report: Report) -> None:
        for group in self.groups:
            _run_group(self, group, results, report)
            gc.collect()
            report.save()

    def passed(self, results: Results) -> bool:
        """Tokens that differ from the eager model's are a figure, and no failure."""
        return True

    def chart(self, results: Results, folder: Path) -> list[str]:
        title = f"{self.name} ({self.weights})"
        return chart.draw_groups(title, results["groups"], folder / "chart.png")


def _run_group(todo: Generation, group: Group, results: Results, report: Report) -> None:
    found: Results = {"runners": {}, "missing": {}, "tasks": []}
    report.stage(f"{group.name}: model")
    model = todo.load(group.dtype).eval()
    sizes = todo.sizes.within(model.config)
    if "config" not in results:
        results["config"] = model.config.to_hf_dict()
        results["parameters"] = model.config.num_parameters
        results["sizes"] = asdict(sizes)
        report.print(headline(results, CPU))
    results["groups"][group.name] = found
    tasks = list(_tasks(todo, sizes, model.config))
    runners: list[Runner] = []
    with tempfile.TemporaryDirectory(prefix="elmkernels-") as folder:
        try:
            for name, make in _makers(todo, group, model, Path(folder), tasks[-1].prompts[:1]):
                report.stage(f"{group.name}: preparing {name}")
                try:
                    runners.append(make())
                except REFUSALS as error:
                    found["missing"][name] = one_line(error)
            found["runners"] |= {r.name: _about(r) for r in runners}
            del model
            for task in tasks:
                _run_task(group, task, runners, sizes, found, report)
        finally:
            for runner in runners:
                runner.close()
            report.print(text(group.name, found))


def _tasks(todo: Generation, sizes: GenerationSizes, config: OpenELMConfig) -> Iterator[Task]:
    generator = torch.Generator().manual_seed(todo.seed + 1)

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(config.vocab_size, (batch, length), generator=generator)

    yield Task(f"prefill {sizes.prefill}", ids(1, sizes.prefill), 0)
    prompts = ids(sizes.batch, sizes.prompt)
    name = f"decode {sizes.steps} after {sizes.prompt}"
    yield Task(name, prompts[:1], sizes.steps)
    if sizes.batch > 1:
        yield Task(f"{name}, batch {sizes.batch}", prompts, sizes.steps)


def _makers(
    todo: Generation, group: Group, model: OpenELM, folder: Path, prompt: Tensor
) -> Iterator[tuple[str, Callable[[], Runner]]]:
    """Every runner of a group by name, and how to build it."""
    dtype = "fp32" if group.dtype == torch.float32 else "bf16"
    yield f"eager {dtype}", lambda: TorchRunner(f"eager {dtype}", EAGER, model)
    if group.compiled:
        name = f"compiled {dtype}"

        def make_compiled() -> Runner:
            if not todo.compiled:
                raise ValueError("left out as asked for")
            return TorchRunner(name, COMPILED, model)

        yield name, make_compiled
    made: dict[str, TorchRunner] = {}
    for format in group.formats:
        yield (
            f"ours {format}",
            lambda format=format: made.setdefault(
                format, our_runner(format, model, folder, prompt, todo.backend)
            ),
        )
        for draft in todo.drafts:
            name = f"ours {format}, {draft}"

            def make_draft(format: str = format, name: str = name, draft: str = draft) -> Runner:
                if format not in made:
                    raise ValueError(f"ours {format} can't run")
                return DraftRunner(name, made[format].model, _draft(todo, draft, group.dtype))

            yield name, make_draft
    for format in todo.rounded(group):
        yield (
            f"ours {format}, int8 activations",
            lambda format=format: rounded_runner(
                format, model, todo.sizes.within(model.config).prompt, todo.backend
            ),
        )
    for type in group.types:

        def make_llama(type: str = type) -> Runner:
            if why := llama_cpp.missing():
                raise ImportError(why)
            return LlamaRunner(model, type, folder)

        yield f"llama.cpp {type.upper()}", make_llama


def _draft(todo: Generation, name: str, dtype: torch.dtype) -> str | OpenELM:
    if name in (LOOKUP, SELF):
        return name
    draft = OpenELM.from_pretrained(name, dtype=dtype).eval()
    accelerate(draft, backend=todo.backend)
    return draft


def _run_task(
    group: Group,
    task: Task,
    runners: Sequence[Runner],
    sizes: GenerationSizes,
    found: Results,
    report: Report,
) -> None:
    peaks: dict[str, int | None] = {}
    runs: dict[str, Run] = {}
    chosen: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {}
    probes: list[dict[str, float]] = []
    try:
        for runner in runners:
            report.stage(f"{group.name}: {task.name}, warming up {runner.name}")
            try:
                runs[runner.name] = run = runner.run(task)
                chosen[runner.name] = run()[0]
                if not task.steps:
                    peaks[runner.name] = runner.peak(run)
            except Exception as error:  # compilers and other people's libraries raise anything
                if runner.kind not in (COMPILED, LLAMA):
                    raise
                runs.pop(runner.name, None)
                found["missing"][f"{runner.name}, {task.name}"] = one_line(error)
                continue
        if task.steps and task.prompts.shape[0] == 1:
            _agree(task, runners, chosen, sizes.agree, found)
        seconds |= {name: [] for name in runs}
        reads = _probes(sizes.probe)
        if task.steps:
            own = {own_read(r.name): reading(r) for r in runners if r.name in runs}
            reads |= {name: read for name, read in own.items() if read is not None}
        for n in range(sizes.rounds):
            report.stage(f"{group.name}: {task.name}, round {n + 1}/{sizes.rounds}")
            for name, why in one_round(n, runs, reads, seconds, probes).items():
                found["missing"][f"{name}, {task.name}"] = why
    finally:
        for runner in runners:
            runner.end()
        if probes:
            found["tasks"].append(figures(task, runners, seconds, probes, sizes.rounds, peaks))


def one_round(
    n: int,
    runs: dict[str, Run],
    probes: dict[str, tuple[Callable[[], object], int]],
    seconds: dict[str, list[float]],
    read: list[dict[str, float]],
) -> dict[str, str]:
    """Append to `seconds` and `read` (bytes a second of each probe) once all had their turn. What
    has died is taken out of `runs` and `seconds`: {its name: of what}.
    """
    turns: dict[str, Callable[[], object]] = {
        **runs,
        **{name: call for name, (call, _) in probes.items()},
    }
    names = list(turns)
    first = n % len(names)
    taken: dict[str, float] = {}
    died: dict[str, str] = {}
    gc.collect()
    gc.disable()
    try:
        for name in (*names[first:], *names[:first]):
            start = time.perf_counter()
            try:
                turns[name]()
            except Died as error:
                died[name] = one_line(error)
            taken[name] = time.perf_counter() - start
    finally:
        gc.enable()
    read.append({name: nbytes / taken[name] for name, (_, nbytes) in probes.items()})
    for name in died:
        del runs[name], seconds[name]
    for name in runs:
        seconds[name].append(taken[name])
    return died


def _probes(nbytes: int) -> dict[str, tuple[Callable[[], object], int]]:
    x = numbers(nbytes, CPU)

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def probe() -> None:
            for _ in range(PROBE_CALLS):
                call()

        return probe

    calls = {name: repeated(call) for name, call in reads(x).items()}
    return {name: (call, PROBE_CALLS * x.nbytes) for name, call in calls.items()}


def _agree(
    task: Task,
    runners: Sequence[Runner],
    chosen: dict[str, list[int]],
    count: int,
    found: dict[str, Any],
) -> None:
    """How many of the first tokens equal those of the eager model in the same weights."""
    eager = next(chosen[r.name] for r in runners if r.kind == EAGER)
    for runner in runners:
        if runner.name not in chosen or runner.kind == EAGER:
            continue
        truth = runner.truth(task.prompts, count)
        truth = eager[:count] if truth is None else truth
        pairs = zip(truth, chosen[runner.name], strict=False)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), count)
        found["runners"][runner.name]["agree"] = {"equal": equal, "of": count}


def _about(runner: Runner) -> dict[str, Any]:
    return {
        "kind": runner.kind,
        "weight_bytes": runner.weight_bytes,
        "cache_token_bytes": runner.cache_token_bytes,
        "agree": None,
        "facts": runner.facts,
    }
