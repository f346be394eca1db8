"""lm-eval's tasks on this package's model: loaded before anything is computed, then evaluated."""

import contextlib
import io
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import one_line
from .suites import AVERAGE, MAIN, Chosen, figures

INSTALL = "pip install 'elmkernels[eval]'"
_SEED = 1234  # of the examples before a question: lm-eval's own
_BOOTSTRAP = 100  # draws for the error of metrics that have no formula of it
_PERCENT = {"acc", "acc_norm", "exact_match", "f1", "pct_stereotype"}
# A repository of the Hub in a message of the library that reads it.
_REPOSITORY = re.compile(r"['\"]([\w.-]+/[\w.-]+)['\"]")
_DATA = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow")


class DataMissing(ValueError):
    """A task whose data can't be reached, with what to fetch."""


def check_installed() -> None:
    """Raise ImportError, with what to install, unless lm-eval is there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"evaluating needs lm-eval ({error}): {INSTALL}") from error


def load_tasks(
    chosen: Sequence[Chosen],
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Tasks with their data, as lm-eval's `evaluate` takes them.

    Args:
        chosen: the tasks.
        folder: of YAML files with tasks of one's own; None for none.
        progress: told the name of each before its data is read; None for nobody.

    Returns:
        lm-eval's tasks and groups by name.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task, or its description is wrong.
        DataMissing: its data can't be reached.
    """
    check_installed()
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"task_folder must be a folder, got {folder}")
    with _quiet():
        manager = _manager(chosen, folder)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for one in chosen:
        if progress is not None:
            progress(one.task)
        with _quiet():
            found = _load(manager, one.task)
        for name, values in found.items():
            loaded.setdefault(name, {}).update(values)
        for task in found["tasks"].values():
            if one.examples is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=one.examples)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
    return loaded


def _manager(chosen: Sequence[Chosen], folder: str | Path | None) -> Any:
    """lm-eval's index of tasks: without its own (it reads thousands of files) if the folder has all
    that are chosen.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(one.task in own.task_index for one in chosen):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _load(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.task_index:
        raise ValueError(f"suite must name tasks that lm-eval or the task folder has, got {name!r}")
    try:
        found = manager.load([name])
    except OSError as error:  # what is not there, and what can't be reached
        text = one_line(error)
        repository = _REPOSITORY.search(text)
        fetch = ""
        if repository is not None and not repository[1].endswith(_DATA):
            fetch = (
                f"; fetch it where there is a network (hf download --repo-type dataset "
                f"{repository[1]}) into the Hub's cache of this machine"
            )
        raise DataMissing(f"the data of {name} can't be reached: {text}{fetch}") from error
    except Exception as error:  # whatever a task's description makes the libraries raise
        raise ValueError(f"the task {name} can't be loaded: {one_line(error)}") from error
    if name not in found["tasks"] and name not in found["groups"]:
        raise ValueError(f"suite must name tasks, {name} is a tag of {', '.join(found['tasks'])}")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Meanwhile the libraries say nothing but errors, and show no bars of theirs."""
    names = ("lm_eval", "datasets", "huggingface_hub", "filelock")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    from datasets.utils import logging as bars
    from lm_eval.api import task as building

    shown, tqdm = bars.is_progress_bar_enabled(), building.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bars.disable_progress_bar()
        building.tqdm = lambda items, *args, **options: items
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        building.tqdm = tqdm
        if shown:
            bars.enable_progress_bar()
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def run(
    lm: Any,
    chosen: Sequence[Chosen],
    tasks: dict[str, Any],
    *,
    suite: str | None = None,
    published: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate tasks.

    Args:
        lm: the model, as `lm.OpenELMLM` makes it.
        chosen, tasks: as `load_tasks` takes and gives them.
        suite: whose figures stand beside, of the model `published`; None for none.
        published: one of Apple's models.
        limit: questions of each task; None for all.

    Returns:
        {"tasks": [{"task", "label", "examples", "metric", "value", "error", "questions",
        "published", "difference", "metrics"}], "average", "published_average", "seconds"}: values
        in percent if they are shares.

    Raises:
        ValueError: a chosen metric is not the task's.
    """
    from lm_eval import evaluator

    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    begin = time.monotonic()
    with _quiet():
        found = evaluator.evaluate(
            lm, tasks, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
        )
    apple = figures(suite, published)
    rows = [_row(one, found, apple) for one in chosen]
    average, whole = None, apple.get(AVERAGE)
    if suite is not None:
        average = sum(row["value"] for row in rows) / len(rows)
    return {
        "tasks": rows,
        "average": average,
        "published_average": whole,
        "average_difference": _difference(average, whole),
        "seconds": time.monotonic() - begin,
    }


def _row(one: Chosen, found: dict[str, Any], apple: dict[str, float]) -> dict[str, Any]:
    values = found.get("groups", {}).get(one.task) or found["results"].get(one.task, {})
    metrics = {k.partition(",")[0]: k for k in values if "," in k and "_stderr" not in k}
    metric = one.metric or next((m for m in MAIN if m in metrics), next(iter(metrics), None))
    if not metrics:
        raise ValueError(f"{one.task} is a group without a figure of its own: name its tasks")
    if metric is None or metric not in metrics:
        raise ValueError(f"{one.task} has no metric {metric}, only {', '.join(metrics) or 'none'}")
    name, _, kind = metrics[metric].partition(",")
    value, error = (
        _scaled(metric, values.get(key)) for key in (f"{name},{kind}", f"{name}_stderr,{kind}")
    )
    figure = apple.get(one.label)
    counts = [found["n-samples"][task]["effective"] for task in _parts(found, one.task)]
    shots = found.get("n-shot", {}).get(one.task)
    return {
        "task": one.task,
        "label": one.label,
        "examples": one.examples if shots is None else shots,
        "metric": metric,
        "value": value,
        "error": error,
        "questions": sum(counts),
        "published": figure,
        "difference": _difference(value, figure),
        "metrics": {m: _scaled(m, values[key]) for m, key in metrics.items()},
    }


def _difference(here: float | None, published: float | None) -> float | None:
    return None if here is None or published is None else here - published


def _parts(found: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group, of its groups too; of a task itself."""
    names = found.get("group_subtasks", {}).get(name)
    return [part for each in names for part in _parts(found, each)] if names else [name]


def _scaled(metric: str, value: Any) -> float | None:
    """A share in percent, any other number as it is."""
    if not isinstance(value, Real):
        return None
    return float(value) * (100 if metric in _PERCENT else 1)
