"""Which routines multiply a run's matrices: chosen once, since each sums in an order of its own.

`engine.plan` of a recipe: nothing takes F.linear for all, so that two runs of a recipe, by as many
threads, end in the same bits; "measured" takes what is fastest as the run begins, which another run
may find otherwise; a mapping names them (see `Plan`). What was taken is in the log's first line, in
every checkpoint, and stays when the run goes on.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..acceleration.routines import (
    AS_MANY,
    LINEAR,
    MV,
    ONEDNN,
    PREPACKED,
    STREAM,
    Plan,
    measure_plan,
    onednn_takes,
)
from .journal import FILE, events
from .schema import known

MEASURED = "measured"
# The routines that each kind of rows may take.
ALLOWED = {
    "one_row": (LINEAR, MV, ONEDNN, PREPACKED, STREAM),
    "few_rows": (LINEAR, ONEDNN, PREPACKED, STREAM),
    "many_rows": (LINEAR, ONEDNN, PREPACKED),
    "training": (LINEAR, ONEDNN),
    "several_rows": (AS_MANY, LINEAR, ONEDNN, PREPACKED),
}
_NAME = "engine.plan"


def named(plan: str | Mapping[str, Any] | None) -> Plan | None:
    """What a recipe's `engine.plan` names, None if that is to be measured. Raises ValueError or
    TypeError for what it can't be.
    """
    if plan == MEASURED:
        return None
    if plan is None:
        return Plan()
    if not isinstance(plan, Mapping):
        checks.fail(_NAME, f"null, {MEASURED} or a mapping of routines", repr(plan))
    known(_NAME, plan, [f.name for f in fields(Plan)])
    for name, value in plan.items():
        allowed = ALLOWED.get(name)
        if allowed is None and not isinstance(value, bool):
            checks.fail(f"{_NAME}.{name}", "true or false", repr(value), TypeError)
        if allowed is not None and value not in allowed:
            checks.fail(f"{_NAME}.{name}", " or ".join(allowed), repr(value))
    return Plan(**plan)


def chosen(plan: str | Mapping[str, Any] | None, stored: Plan | None, device: torch.device) -> Plan:
    """A run's routines. stored: of the run that is gone on with, which stay unless the recipe names
    others. Raises ValueError if the recipe names a library that isn't right here.
    """
    if isinstance(plan, Mapping) or stored is None:
        found = named(plan)
        if found is None:
            return measure_plan(torch.float32) if device.type == "cpu" else Plan()
        routines = {getattr(found, name) for name in ALLOWED}
        if device.type == "cpu" and routines & {ONEDNN, PREPACKED}:
            if not onednn_takes(torch.float32):
                count = torch.get_num_threads()
                expected = f"routines that give F.linear's products here, by {count} threads"
                checks.fail(_NAME, expected, ONEDNN)
        return found
    return stored


def noted(out: Path) -> Plan | None:
    """The routines of a run that was ended before its first checkpoint, from its log."""
    try:
        begun = [e["plan"] for e in events(out / FILE) if e["event"] == "start"]
        return named(begun[-1]) if begun and isinstance(begun[-1], Mapping) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
