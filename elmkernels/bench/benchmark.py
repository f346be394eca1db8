"""The one interface of what measures whole models: the check of a model, generation, a training
step, and the check of a GPU.

A benchmark fills one dict of plain values as it measures. Whoever stops it early has all that was
finished before, and "complete" says False.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..openelm.config import OpenELMConfig
from .machine import busy

Results = dict[str, Any]
S = TypeVar("S", bound="Sizes")

# What is measured side by side, as results, tables and charts name it.
EAGER, ACCELERATED, COMPILED = "eager", "accelerated", "compiled"
OURS, LLAMA = "ours", "llama.cpp"  # kinds of runners; ours are accelerated, in any format
EVERY_LOGIT = f"{EAGER}, every logit"
TORCH = "torch baseline"

_SMALL = OpenELMConfig(
    num_transformer_layers=2, model_dim=128, head_dim=64, num_gqa_groups=2, vocab_size=512,
    ffn_dim_divisor=64, qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0),
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip


def shape_of(model: str, full: bool = True) -> OpenELMConfig:
    """A model's shape by its name; if not full, one of two small layers of different widths, which
    shows that a benchmark runs.
    """
    return OpenELMConfig.from_name(model) if full else _SMALL


class Report:
    """What a benchmark tells while it runs. This one is silent."""

    def stage(self, text: str) -> None:
        """Say what comes next."""

    def print(self, text: str) -> None:
        """Show a part that is finished."""

    def save(self) -> None:
        """Keep the results as they are now."""


class Printed(Report):
    """Shows the parts on stdout, for scripts."""

    def print(self, text: str) -> None:
        print(text)


SILENT = Report()


@dataclass(frozen=True)
class Sizes:
    """How much is run. Each benchmark has its own fields, with defaults for figures."""

    @classmethod
    def quick(cls: type[S]) -> S:
        """The least that still runs everything."""
        raise NotImplementedError

    @classmethod
    def chosen(cls: type[S], quick: bool, options: Mapping[str, int | None]) -> S:
        """The usual or quick sizes with the options that were given; None is one that wasn't."""
        found = {name: value for name, value in options.items() if value is not None}
        return replace(cls.quick() if quick else cls(), **found)


class Benchmark(ABC):
    """A measurement of whole models: what it is to measure is in its fields."""

    @property
    @abstractmethod
    def stages(self) -> int:
        """How often `run` says what comes next, if nothing is missing."""

    @abstractmethod
    def describe(self) -> Results:
        """What is measured, on which machine, and the empty places of what will be."""

    @abstractmethod
    def measure(self, results: Results, report: Report) -> None:
        """Fill results. Raises KeyboardInterrupt with what was measured in them."""

    @abstractmethod
    def passed(self, results: Results) -> bool:
        """Whether no parity that was measured failed."""

    @abstractmethod
    def chart(self, results: Results, folder: Path) -> list[str]:
        """Draw what there are figures of; returns the names of the files."""

    def summary(self, results: Results) -> str:
        """The whole report as markdown, for benchmarks that don't print parts as they come."""
        return ""

    def start(self) -> Results:
        """The results before anything is measured. The load counts one's own work too, so a busy
        machine is looked for here.
        """
        return {"complete": False, "busy": busy()} | self.describe()

    def run(self, results: Results, report: Report = SILENT) -> None:
        """Measure everything, beginning with what distorts the figures."""
        if results.get("busy"):
            report.print(results["busy"])
        self.measure(results, report)
        results["complete"] = True


def headline(results: Results, device: object) -> str:
    """Which model is measured on which machine."""
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{results['model']}, {results['parameters'] / 1e6:.1f}M parameters, {results['weights']}\n"
        f"on {device}: {where}, torch {machine['torch']}"
    )
