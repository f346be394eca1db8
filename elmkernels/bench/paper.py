"""The comparison of OpenELM's paper on this machine: tokens a second of a prompt, of generation and
of both together, in bfloat16 and at batch 1.

OpenELM runs as Apple's code does (naive), with torch's own fused operations, accelerated, and with
packed12 and 4-bit weights; models of OLMo's and Llama's shapes run through transformers, eager and
compiled. All take turns, round by round, in a rotated order. The tokens of each OpenELM are
compared with those of the eager reference in the same weights. What can't run is named with the
reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..acceleration.swap import accelerate
from ..checks import one_line
from ..generation.step import greedy
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from . import chart
from .baselines import peers
from .baselines.naive import NaiveRunner
from .baselines.torch_baseline import TorchBaselineRunner
from .benchmark import ACCELERATED, OURS, Benchmark, Report, Results, Sizes, headline
from .generation import REFUSALS, one_round
from .runners import Run, Runner, Task, TorchRunner, compress
from .table import format_table
from .timing import fingerprint, summary

CPU = torch.device("cpu")
NAIVE, FUSED = "naive", "torch's fused operations"
PEERS = {"olmo": peers.OLMO, "llama": peers.LLAMA}
CHOICES = ("naive", "fused", ACCELERATED, "packed12", "int4", *PEERS)
PROMPT, GENERATION, TOTAL = PARTS = ("prompt", "generation", "total")


@dataclass(frozen=True)
class PaperSizes(Sizes):
    """Tokens of the prompt, tokens after it, rounds, tokens that are compared."""

    prompt: int = 256
    steps: int = 32
    rounds: int = 3
    agree: int = 8

    @classmethod
    def quick(cls) -> "PaperSizes":
        return cls(prompt=16, steps=4, rounds=2, agree=4)

    def within(self, config: OpenELMConfig) -> "PaperSizes":
        """The same, shortened to the positions that a model has."""
        prompt = min(self.prompt, max(1, config.rope_max_length // 2))
        steps = min(self.steps, config.rope_max_length - prompt - 1)
        return replace(self, prompt=prompt, steps=steps, agree=min(self.agree, steps + 1))


@dataclass(frozen=True, kw_only=True)
class Paper(Benchmark):
    """load: the model in a dtype; weights: where they come from, in words; choices: of CHOICES;
    tiny: peers of the least size.
    """

    load: Callable[[torch.dtype], OpenELM]
    name: str
    weights: str
    choices: tuple[str, ...] = CHOICES
    sizes: PaperSizes = PaperSizes()
    compiled: bool = True
    tiny: bool = False
    backend: str | None = None
    seed: int = 0

    @property
    def stages(self) -> int:
        found = len(self.choices) + self.compiled * len(self.peers)
        return 1 + 2 * found + self.sizes.rounds

    @property
    def peers(self) -> list[str]:
        """The shapes of other families that were asked for."""
        return [PEERS[choice] for choice in self.choices if choice in PEERS]

    def describe(self) -> Results:
        return {
            "model": self.name,
            "weights": self.weights,
            "machine": fingerprint(CPU),
            "backend": self.backend,
            "seed": self.seed,
            "tiny peers": self.tiny,
            "runners": {},
            "missing": {},
        }

    def measure(self, results: Results, report: Report) -> None:
        report.stage("model")
        model = self.load(torch.bfloat16).eval()
        sizes = self.sizes.within(model.config)
        results["config"] = model.config.to_hf_dict()
        results["parameters"] = model.config.num_parameters
        results["sizes"] = asdict(sizes)
        report.print(headline(results, CPU))
        tasks = _tasks(self.seed, sizes, model.config)
        truth = greedy(model, tasks[PROMPT].prompts, sizes.agree)[0].tolist()
        runners: dict[str, Runner] = {}
        runs: dict[str, Run] = {}
        try:
            for name, make in self._makers(model):
                report.stage(f"preparing {name}")
                try:
                    runners[name] = make()
                except REFUSALS as error:
                    results["missing"][name] = one_line(error)
            del model
            for name in list(runners):
                report.stage(f"warming up {name}")
                _warm(name, runners, tasks, runs, truth, results)
            self._rounds(runs, results, report, sizes)
        finally:
            for runner in runners.values():
                runner.close()
            report.print(text(results))

    def _rounds(
        self, runs: dict[str, Run], results: Results, report: Report, sizes: PaperSizes
    ) -> None:
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for n in range(sizes.rounds):
            report.stage(f"round {n + 1}/{sizes.rounds}")
            one_round(n, runs, {}, seconds, [])
            for name in results["runners"]:
                taken = {part: seconds[_key(name, part)] for part in (PROMPT, GENERATION)}
                results["runners"][name] |= _figures(taken, sizes)
            report.save()

    def _makers(self, model: OpenELM) -> Iterator[tuple[str, Callable[[], Runner]]]:
        """Every runner that was asked for by its name, and how to build it."""
        own: dict[str, tuple[str, Callable[[str], Runner]]] = {
            "naive": (NAIVE, lambda name: NaiveRunner(name, model)),
            "fused": (FUSED, lambda name: TorchBaselineRunner(model)),
            "accelerated": (ACCELERATED, lambda name: self._ours(name, "bf16", model)),
            "packed12": (
                f"{ACCELERATED}, packed12", lambda name: self._ours(name, "packed12", model)
            ),
            "int4": (f"{ACCELERATED}, int4", lambda name: self._ours(name, "int4", model)),
        }  # fmt: skip
        for choice in self.choices:
            if choice in own:
                name, make = own[choice]
                yield name, lambda make=make, name=name: make(name)
            else:
                yield from self._of_peer(PEERS[choice])

    def _ours(self, name: str, format: str, model: OpenELM) -> Runner:
        ours = compress(format, model, progress=False)
        accelerate(ours, backend=self.backend)
        return TorchRunner(name, OURS, ours)

    def _of_peer(self, shape: str) -> Iterator[tuple[str, Callable[[], Runner]]]:
        built: list[Any] = []

        def make(name: str, options: dict[str, Any] | None) -> Runner:
            if not built:
                built.append(peers.build(shape, torch.bfloat16, CPU, self.tiny))
            return peers.PeerRunner(name, built[0], options)

        yield f"{shape}, eager", lambda: make(f"{shape}, eager", None)
        if self.compiled:
            yield f"{shape}, compiled", lambda: make(f"{shape}, compiled", {"dynamic": False})

    def passed(self, results: Results) -> bool:
        """Tokens that differ from the eager model's are a figure, and no failure."""
        return True

    def chart(self, results: Results, folder: Path) -> list[str]:
        measured = {n: r for n, r in results["runners"].items() if "tokens_per_second" in r}
        if not measured:
            return []
        tasks = [
            {
                "task": part,
                "rates": {n: r["tokens_per_second"][part] for n, r in measured.items()},
                "kinds": {n: r["kind"] for n, r in measured.items()},
                "ceiling": None,
            }
            for part in PARTS
        ]
        title = f"{results['model']} ({results['weights']}), bfloat16"
        return chart.draw_rates(title, tasks, folder / "chart.png", "tokens/s")


def _key(name: str, part: str) -> str:
    return f"{name}: {part}"


def _tasks(seed: int, sizes: PaperSizes, config: OpenELMConfig) -> dict[str, Task]:
    generator = torch.Generator().manual_seed(seed + 1)
    prompt: Tensor = torch.randint(config.vocab_size, (1, sizes.prompt), generator=generator)
    return {PROMPT: Task(PROMPT, prompt, 0), GENERATION: Task(GENERATION, prompt, sizes.steps)}


def _warm(
    name: str,
    runners: dict[str, Runner],
    tasks: dict[str, Task],
    runs: dict[str, Run],
    truth: list[int],
    results: Results,
) -> None:
    """Run both tasks once: compilers compile, and what OpenELM generates is compared."""
    runner = runners[name]
    found: dict[str, Run] = {}
    chosen: list[int] = []
    try:
        for part, task in tasks.items():
            found[_key(name, part)] = run = runner.run(task)
            chosen = run()[0]
    except Exception as error:  # compilers and other people's libraries raise anything
        if runner.kind == OURS or name in (NAIVE, FUSED):
            raise
        results["missing"][name] = one_line(error)
        return
    runs |= found
    agree = None
    if runner.kind == OURS or name in (NAIVE, FUSED):
        own = runner.truth(tasks[PROMPT].prompts, len(truth))
        pairs = zip(truth if own is None else own, chosen, strict=False)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(truth))
        agree = {"equal": equal, "of": len(truth)}
    results["runners"][name] = {
        "kind": runner.kind, "weight_bytes": runner.weight_bytes, "agree": agree,
    }  # fmt: skip


def _figures(seconds: dict[str, list[float]], sizes: PaperSizes) -> dict[str, Any]:
    """Tokens a second of each part and of both, by the medians of the rounds."""
    both = [sum(pair) for pair in zip(*seconds.values(), strict=True)]
    samples = {**seconds, TOTAL: both}
    tokens = {PROMPT: sizes.prompt, GENERATION: sizes.steps, TOTAL: sizes.prompt + sizes.steps}
    timings = {part: summary(taken) for part, taken in samples.items()}
    return {
        "tokens_per_second": {part: tokens[part] / timings[part].median for part in PARTS},
        "seconds": {part: asdict(t) for part, t in timings.items()},
        "samples": {part: list(taken) for part, taken in samples.items()},
    }


def rows(results: Results) -> list[dict[str, Any]]:
    """A line of a table for each runner that was measured."""
    measured = {n: r for n, r in results["runners"].items() if "tokens_per_second" in r}
    slowest = measured.get(NAIVE)
    lines = []
    for name, found in measured.items():
        rates, agree = found["tokens_per_second"], found["agree"]
        line: dict[str, Any] = {"model": name if agree is None else f"OpenELM, {name}"}
        line |= {f"{part} tokens/s": rates[part] for part in PARTS}
        if slowest is not None:
            ratios = [rates[part] / slowest["tokens_per_second"][part] for part in PARTS]
            line["x naive"] = " / ".join(f"{ratio:.2f}" for ratio in ratios)
        line["weights MiB"] = round(found["weight_bytes"] / 2**20)
        line["agrees"] = "" if agree is None else f"{agree['equal']}/{agree['of']}"
        lines.append(line)
    return lines


def text(results: Results) -> str:
    """The table, and what is missing."""
    found = rows(results)
    sizes = results["sizes"]
    head = f"\na prompt of {sizes['prompt']}, then {sizes['steps']} tokens, bfloat16, batch 1"
    lines = [head, format_table(found)] if found else []
    return "\n".join([*lines, *(f"missing {n}: {why}" for n, why in results["missing"].items())])
