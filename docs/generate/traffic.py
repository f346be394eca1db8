"""The tables of docs/gpu.md: what kernels move, from benchmarks/results/traffic-sm80."""

from collections import Counter
from typing import Any

from .figures import results, table

MODELS = ("270M", "450M", "1_1B", "3B")
WHOLE = ("270M_rows_17", "3B_rows_17")  # of ops of rows, those that the long table has
SECTOR = 32


def _records() -> list[dict[str, Any]]:
    return results("traffic-sm80")["records"]


def _of_rows(one: dict[str, Any]) -> bool:
    return "_rows_" in one["case"] and one["case"].startswith(MODELS)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2f}x" if whole else ""


def _again(one: dict[str, Any]) -> dict[str, float]:
    """How often over accesses touch a tensor's sectors, if that is more than 1% of the least."""
    found = {}
    for launched in one["launches"]:
        for name, (sectors, distinct) in launched["tensors"].items():
            if SECTOR * (sectors - distinct) > one["least"] / 100:
                found[name] = sectors / distinct
    return found


def least() -> str:
    """What is touched at all, and by each access, beside the least: by model and rows."""
    found: dict[tuple, dict[str, dict]] = {}
    for one in filter(_of_rows, _records()):
        model, _, rows = one["case"].partition("_rows_")
        found.setdefault((one["op"], one["direction"], int(rows)), {})[model] = one
    lines = []
    for (op, direction, rows), by_model in found.items():
        again: dict[str, list[float]] = {}
        for one in by_model.values():
            for name, times in _again(one).items():
                again.setdefault(name, []).append(times)
        cells = [
            f"{_share(one['distinct'], one['least'])} ({_share(one['sectors'], one['least'])})"
            for one in (by_model[model] for model in MODELS)
        ]
        named = ", ".join(f"`{name}` {max(times):.0f}x" for name, times in again.items())
        lines.append([f"`{op}`", direction, str(rows), *cells, named])
    return table(("op", "pass", "rows", *MODELS, "touched again, at most"), lines)


def traffic() -> str:
    rows = []
    for one in _records():
        if _of_rows(one) and one["case"] not in WHOLE:
            continue
        issued = Counter()
        for launched in one["launches"]:
            issued.update(launched["issued"])
        names = dict.fromkeys(run["kernel"].partition(".")[2] for run in one["launches"])
        most = ", ".join(f"{kind} {n / issued.total():.0%}" for kind, n in issued.most_common(3))
        accesses = sum(launched["shared"] for launched in one["launches"])
        rows.append(
            [
                f"`{one['op']}`",
                f"`{one['case']}`",
                one["direction"],
                " ".join(f"`{name}`" for name in names),
                f"{one['least']:,}",
                *(_share(one[name], one["least"]) for name in ("asked", "sectors", "distinct")),
                _share(one["conflicts"], accesses) if accesses else "",
                f"{one['instructions per element']:.1f}",
                most,
            ]
        )
    head = (
        "op", "case", "pass", "kernels", "least bytes", "asked", "sectors", "distinct",
        "conflicts", "instructions", "most of them",
    )  # fmt: skip
    return table(head, rows)
