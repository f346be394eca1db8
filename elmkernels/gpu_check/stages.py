"""Work in stages under a clock: what fails is recorded and the rest goes on.

A stage has a share of the time and is made of units. What a stage leaves of its time goes to the
later ones; a unit that finds none left is named as left out. Results are one dict of plain values,
kept after every unit, from which a later run can go on.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..bench.benchmark import SILENT, Report
from ..bench.benchmark import Results as Found
from ..checks import one_line

DONE, FAILED, RUNNING, INTERRUPTED = "done", "failed", "running", "interrupted"
LIMIT = 90.0  # seconds without an answer after which a unit is taken to hang, beside its share


class LeftOut(Exception):
    """Why a unit can't be done here: what was found and what is needed."""


class DeadDevice(Exception):
    """A kernel broke the device for this process: whatever follows needs another one."""


class Clock:
    """Seconds that are left of a number of them. now: what tells the time."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds

    def left(self) -> float:
        return self.end - self.now()

    def part(self, seconds: float) -> "Clock":
        """A clock of at most `seconds` of these."""
        return Clock(max(0.0, min(seconds, self.left())), self.now)


@dataclass(frozen=True)
class Unit:
    """run fills a dict, kept even if it fails, within about the time of its clock. limit: the
    seconds after which it is taken to hang (see `watch`), LIMIT if None; if units split a
    stage's time, its part of that is added.
    """

    name: str
    run: Callable[[Found, Clock], None]
    limit: float | None = None


@dataclass(frozen=True)
class Stage:
    """share: of the time, beside the other stages'. units: asked for when the stage begins.
    split: each unit gets its part of the time; else the first may take all of it.
    """

    name: str
    share: float
    units: Callable[[], Sequence[Unit]]
    split: bool = False


def run_stages(
    stages: Sequence[Stage],
    results: Found,
    clock: Clock,
    report: Report = SILENT,
    lives: Callable[[], bool] = lambda: True,
) -> None:
    """Fill results["stages"]; what is there already is not done again. report: saves before and
    after each unit. lives: whether the device still works after a failure; raises DeadDevice if it
    doesn't.
    """
    kept = results.setdefault("stages", {})
    for i, stage in enumerate(stages):
        share = stage.share / sum(s.share for s in stages[i:])
        found = kept.setdefault(stage.name, {"seconds": 0.0, "units": {}, "left_out": {}})
        _run_stage(stage, found, clock.part(clock.left() * share), report, lives)
    results["complete"] = True


def _run_stage(
    stage: Stage, found: Found, clock: Clock, report: Report, lives: Callable[[], bool]
) -> None:
    seconds = max(0.0, clock.left())
    report.stage(f"{stage.name} ({seconds:.0f} s)")
    units = list(stage.units())
    todo = [u for u in units if not _settled(found["units"].get(u.name))]
    todo = [u for u in todo if u.name not in found["left_out"]]
    begin = clock.now()
    try:
        for i, unit in enumerate(todo):
            if clock.left() <= 0:
                found["left_out"][unit.name] = f"no time: the stage had {seconds:.0f} s"
                continue
            report.stage(f"{stage.name}: {unit.name}")
            part = clock.part(clock.left() / (len(todo) - i)) if stage.split else clock
            limit = LIMIT if unit.limit is None else unit.limit
            limit += part.left() if stage.split else 0.0
            found["units"][unit.name] = {"state": RUNNING, "limit": limit}
            _run_unit(unit, found, part, report)
            report.save()
            broken = found["units"].get(unit.name, {}).get("state") == FAILED and not lives()
            if broken:
                raise DeadDevice(f"{stage.name}: {unit.name}")
    finally:
        found["seconds"] += clock.now() - begin
        report.save()


def _settled(unit: Found | None) -> bool:
    """Whether a unit is not to be run again: one found as running ended its process."""
    if unit is None or unit["state"] == INTERRUPTED:
        return False
    if unit["state"] == RUNNING:
        unit |= {"state": FAILED, "error": "the process ended in it"}
        unit.pop("limit", None)
    return True


def _run_unit(unit: Unit, stage: Found, clock: Clock, report: Report) -> None:
    found: Found = stage["units"][unit.name]
    begin = clock.now()
    try:
        report.save()
        unit.run(found, clock)
        found["state"] = DONE
    except LeftOut as why:
        del stage["units"][unit.name]
        stage["left_out"][unit.name] = str(why)
    except (torch.OutOfMemoryError, MemoryError) as error:
        del stage["units"][unit.name]
        stage["left_out"][unit.name] = f"out of memory: {first_line(error)}"
    except Exception as error:  # a check is there to find what nobody expected
        where = traceback.format_exception(error)[-6:]
        found |= {"state": FAILED, "error": first_line(error), "trace": "".join(where)}
    except BaseException:
        found["state"] = INTERRUPTED
        raise
    finally:
        found.pop("limit", None)
        found["seconds"] = clock.now() - begin


def first_line(error: BaseException) -> str:
    """An error in one line, with its kind."""
    return f"{type(error).__name__}: {one_line(error)}"
