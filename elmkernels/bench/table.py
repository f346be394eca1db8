"""Rows of figures as text: aligned for a terminal, or as markdown."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def cell(value: Any) -> str:
    """A value in a table: numbers to three digits, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 10000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def share(part: float | None) -> str:
    """A share of a ceiling. One above 1 is of no ceiling, and None is of one that was dropped."""
    return "not usable" if part is None or part > 1 else f"{part:.0%}"


def format_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, without the columns that hold None alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) is not None for row in rows)]
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells), 0) for i, c in enumerate(columns)]
    right = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]

    def line(texts: Sequence[str]) -> str:
        padded = (
            t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), *map(line, cells)])


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a markdown table, without the columns that are empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column)).replace("|", "/") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
