"""Figures as one picture: tokens a second of each model or runner, beside the ceiling."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backends import Reason
from ..weights.storage import replacing
from .benchmark import ACCELERATED, COMPILED, EAGER, EVERY_LOGIT, LLAMA, OURS, TORCH

COLORS = {
    EAGER: "#9aa5b1",
    EVERY_LOGIT: "#d3d9e0",
    ACCELERATED: "#1f77b4",
    COMPILED: "#c9a227",
    OURS: "#1f77b4",
    "accelerated, graph": "#0b4a7a",
    TORCH: "#66717d",
    LLAMA: "#8c564b",
}


def missing() -> Reason | None:
    """Why no chart can be drawn here, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "chart.png needs matplotlib: pip install 'elmkernels[plot]'"
    return None


def draw(title: str, results: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> list[str]:
    """results: {dtype: the `json()` of every `roofline.Measured`}. Writes a PNG in one step if
    there is a task, and returns the names of what it wrote, as all drawing functions do.
    """
    from matplotlib.figure import Figure

    panels = [(dtype, task) for dtype, tasks in results.items() for task in tasks]
    if not panels:
        return []
    columns = max(len(tasks) for tasks in results.values())
    filled = [dtype for dtype, tasks in results.items() if tasks]
    figure = Figure(figsize=(3.4 * columns, 2.9 * len(filled) + 0.4), layout="constrained")
    axes = figure.subplots(len(filled), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for line, dtype in enumerate(filled):
        for column, task in enumerate(results[dtype]):
            _panel(axes[line][column], dtype, task)
    return write(figure, title, path)


def draw_groups(title: str, groups: dict[str, dict[str, Any]], path: Path) -> list[str]:
    """groups: those of the results of `bench.generation`."""
    from matplotlib.figure import Figure

    filled = {name: group["tasks"] for name, group in groups.items() if group["tasks"]}
    if not filled:
        return []
    columns = max(map(len, filled.values()))
    figure = Figure(figsize=(4.6 * columns, 2.4 * len(filled) + 0.4), layout="constrained")
    axes = figure.subplots(len(filled), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for line, (name, tasks) in zip(axes, filled.items(), strict=True):
        for axis, task in zip(line, tasks, strict=False):
            _group_panel(axis, name, task)
    return write(figure, title, path)


def draw_rates(title: str, tasks: Sequence[dict[str, Any]], path: Path, unit: str) -> list[str]:
    """tasks: {"task", "rates": {name: units a second}, "ceiling": those at best, or None}, a panel
    each; "kinds" {name: ...} of what isn't named by its kind.
    """
    from matplotlib.figure import Figure

    if not tasks:
        return []
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.1 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        names, rates = list(task["rates"]), list(task["rates"].values())
        kinds = task.get("kinds", {})
        colors = [COLORS.get(kinds.get(name, name), "#888888") for name in names]
        bars = axis.barh(range(len(names)), rates, color=colors)
        labels = [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates]
        axis.bar_label(bars, labels, padding=3, fontsize=7)
        if task["ceiling"] is not None:
            axis.axvline(task["ceiling"], color="#d62728", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(task["ceiling"] or 0.0, *rates))
        axis.tick_params("x", labelsize=7)
        axis.set_title(f"{task['task']}, {unit}", fontsize=8)
    return write(figure, title, path)


def _group_panel(axis: Any, group: str, task: dict[str, Any]) -> None:
    """Bars of tokens a second with whiskers from p20 to p80, and the share of reading memory."""
    axis.set_visible(True)
    names, found = list(task["runners"]), list(task["runners"].values())
    rates = [f["tokens_per_second"] for f in found]
    speeds = [rate["median"] for rate in rates]
    low = [rate["median"] - rate["p20"] for rate in rates]
    high = [rate["p80"] - rate["median"] for rate in rates]
    colors = [COLORS.get(f["kind"], "#888888") for f in found]
    bars = axis.barh(range(len(names)), speeds, xerr=[low, high], color=colors, capsize=2)
    labels = [
        (f"{rate['median']:,.0f}" if rate["median"] >= 100 else f"{rate['median']:.3g}")
        + (f", {f['of_read_bandwidth']:.0%} of reading" if f.get("of_read_bandwidth") else "")
        for rate, f in zip(rates, found, strict=True)
    ]
    axis.bar_label(bars, labels, padding=4, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.6 * max(rate["p80"] for rate in rates))
    axis.set_title(f"{group}: {task['task']}", fontsize=9)
    axis.set_xlabel("tokens/s", fontsize=8)


def write(figure: Any, title: str, path: Path) -> list[str]:
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return [path.name]


def _panel(axis: Any, dtype: str, task: dict[str, Any]) -> None:
    """Bars of tokens a second with whiskers from p20 to p80, and the ceiling as a line."""
    axis.set_visible(True)
    tokens, names = task["tokens"], list(task["times"])
    speeds = [tokens / task["times"][n]["median"] for n in names]
    low = [s - tokens / task["times"][n]["p80"] for n, s in zip(names, speeds, strict=True)]
    high = [tokens / task["times"][n]["p20"] - s for n, s in zip(names, speeds, strict=True)]
    colors = [COLORS.get(n, "#888888") for n in names]
    bars = axis.bar(range(len(names)), speeds, yerr=[low, high], color=colors, capsize=3)
    labels = [f"{s:,.0f}" if s >= 100 else f"{s:.3g}" for s in speeds]
    labels = [
        f"{label}\naccelerated {task['ratio'][n]:.2f}x" if n in task["ratio"] else label
        for n, label in zip(names, labels, strict=True)
    ]
    axis.bar_label(bars, labels, padding=3, fontsize=8)
    ceiling = tokens / task["floor"] if task["of_ceiling"] else None
    if ceiling is not None:
        axis.axhline(ceiling, color="#d62728", linewidth=1, linestyle="--")
        axis.annotate(
            f"ceiling {ceiling:,.0f} ({task['bound']})",
            (0.02, ceiling),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=7,
            color="#d62728",
        )
    axis.set_ylim(0, 1.25 * max(ceiling or 0.0, *speeds))
    axis.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=8)
    axis.set_title(f"{dtype}: {task['task']}", fontsize=9)
    axis.set_ylabel("tokens/s", fontsize=8)
