"""Suites of tasks, and the figures that Apple published for them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..checks import fail
from ..openelm.config import VARIANTS, OpenELMConfig

_FILE = Path(__file__).with_name("published.json")
# Metrics that a task without one of its own is known by, the first that it has.
MAIN = ("acc_norm", "acc", "exact_match", "f1", "pct_stereotype", "word_perplexity")
AVERAGE = "Average"


@dataclass(frozen=True)
class Chosen:
    """A task of lm-eval, and how it is asked.

    Attributes:
        task: its name there.
        label: its name in a table.
        examples: shown before a question; None for as many as the task itself says.
        metric: the one that is reported; None for the first of MAIN that it has.
    """

    task: str
    label: str
    examples: int | None = None
    metric: str | None = None


@cache
def _published() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def source() -> str:
    """Where suites and figures come from."""
    return _published()["source"]


def names() -> list[str]:
    """The suites that there are."""
    return list(_published()["suites"])


def find(suite: str, examples: int | None = None) -> tuple[str | None, list[Chosen]]:
    """What a suite consists of.

    Args:
        suite: its name, or tasks of lm-eval, separated by commas.
        examples: of named tasks; a suite has its own.

    Returns:
        The suite's name, None for named tasks; and the tasks.

    Raises:
        ValueError: no task is named, one is named twice, or examples are given for a suite.
    """
    known = _published()["suites"].get(suite)
    if known is not None:
        if examples is not None:
            fail("examples", f"None for {suite}, which has its own", examples)
        return suite, [Chosen(**task) for task in known]
    tasks = [name.strip() for name in suite.split(",") if name.strip()]
    if not tasks or len(set(tasks)) < len(tasks):
        fail("suite", f"one of {', '.join(names())}, or tasks of lm-eval, each once", repr(suite))
    if within := [name for name in tasks if name in names()]:
        fail("suite", f"{within[0]} alone, or tasks without it", repr(suite))
    return None, [Chosen(name, name, examples) for name in tasks]


def published_model(config: OpenELMConfig, name: str) -> str | None:
    """Which of Apple's models a checkpoint has figures of, by its shape and by its name.

    Args:
        config: the shape.
        name: of the checkpoint; "Instruct" in it means the tuned one.

    Returns:
        The model's name; None if none has the shape.
    """
    shape = (config.model_dim, config.num_query_heads, config.ffn_dims)
    for variant in VARIANTS:
        other = OpenELMConfig.from_name(variant)
        if shape == (other.model_dim, other.num_query_heads, other.ffn_dims):
            return f"{variant}-Instruct" if "instruct" in name.lower() else variant
    return None


def figures(suite: str | None, model: str | None) -> dict[str, float]:
    """What Apple published, in percent.

    Args:
        suite: a suite's name; None has no figures.
        model: one of Apple's models; None has no figures.

    Returns:
        The figure of each label, and of AVERAGE.
    """
    found = _published()["figures"].get(suite, {}).get(model)
    if found is None:
        return {}
    labels = [task["label"] for task in _published()["suites"][suite]]
    return dict(zip([*labels, AVERAGE], found, strict=True))
