"""Stages in a process of their own, which is ended if a unit of them hangs.

A kernel that never ends can't be interrupted: whoever waits for it waits inside the driver, and
only the end of the process frees the device. So a worker does the stages and keeps its results in a
file before and after every unit, and whoever started it reads how long the running one has taken.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .stages import DONE, FAILED, INTERRUPTED, LIMIT, RUNNING, Clock, Found

POLL = 0.5
BETWEEN = 120.0  # seconds that a worker may be without a unit: it starts, or looks at its device
OVERTIME = 60.0  # how long after the end of all the time a unit may still run
HUNG = "hung"  # what the error of a unit that was ended begins with
GRACE = 20.0  # seconds to end in, when asked to


class Stuck(RuntimeError):
    """A worker ended, or had to be ended, before it got anything done."""


@dataclass(frozen=True)
class Worker:
    """command: of a process that goes on with the results for so many seconds. read and write: the
    results, as they are kept. note is told why a worker was ended, or ended early.
    """

    command: Callable[[float], list[str]]
    read: Callable[[], Found]
    write: Callable[[Found], None]
    note: Callable[[str], None] = lambda text: None


def run_watched(worker: Worker, clock: Clock) -> None:
    """Have everything done, by as many workers as it takes: the unit that one ends in, or hangs in,
    has failed. Raises KeyboardInterrupt with what was done kept, Stuck if no worker gets on.
    """
    while True:
        before = len(_settled(worker.read()))
        code, hung = _run_one(worker, clock)
        found = worker.read()
        if code in (0, 1) and found.get("complete"):
            return
        why = f"{HUNG}: no answer for {hung:.0f} s" if hung else f"its process ended with {code}"
        unit = _running(found)
        if unit is not None:
            entry = found["stages"][unit[0]]["units"][unit[1]]
            entry |= {"state": FAILED, "error": why, "seconds": hung}
            entry.pop("limit", None)
            found["stages"][unit[0]]["seconds"] += hung
            worker.write(found)
        where = "before its first unit" if unit is None else ": ".join(unit)
        if len(_settled(found)) <= before:
            raise Stuck(f"{where}: {why}")
        worker.note(f"{where}: {why}; another process goes on")


def _run_one(worker: Worker, clock: Clock) -> tuple[int | None, float]:
    """A worker's exit code and 0, or None and the seconds for which it gave no answer."""
    # A session of its own: Ctrl-C comes here, and the worker is told once.
    process = subprocess.Popen(
        worker.command(max(0.0, clock.left())), stdout=subprocess.DEVNULL, start_new_session=True
    )
    seen, since = None, time.monotonic()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL), 0.0
            now, (what, limit) = time.monotonic(), _doing(worker.read())
            if what != seen:
                seen, since = what, now
            if now - since > min(limit, max(0.0, clock.left()) + OVERTIME):
                _end(process)
                return None, now - since
    except BaseException:
        _interrupt(process)
        _mark_interrupted(worker)
        raise


def _doing(found: Found) -> tuple[tuple, float]:
    """What a worker is doing, which is another thing with every unit, and its limit in seconds."""
    unit = _running(found)
    if unit is None:
        return (len(_settled(found)),), BETWEEN
    return unit, found["stages"][unit[0]]["units"][unit[1]].get("limit", LIMIT)


def _units(found: Found) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    stages = found.get("stages", {}).items()
    return [((stage, name), u) for stage, entry in stages for name, u in entry["units"].items()]


def _running(found: Found) -> tuple[str, str] | None:
    return next((where for where, u in _units(found) if u["state"] == RUNNING), None)


def _settled(found: Found) -> list[tuple[str, str]]:
    return [where for where, u in _units(found) if u["state"] in (DONE, FAILED)]


def _end(process: subprocess.Popen) -> None:
    """Kill a worker and what it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits inside the driver may take its time; there is nothing more to be done.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def _interrupt(process: subprocess.Popen) -> None:
    """Ask a worker to end and keep what it has, and kill it if it doesn't."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _end(process)


def _mark_interrupted(worker: Worker) -> None:
    found = worker.read()
    unit = _running(found)
    if unit is not None:
        found["stages"][unit[0]]["units"][unit[1]]["state"] = INTERRUPTED
        worker.write(found)
