"""Files that anybody may have written: mutations of good ones, read in a process that is watched.

`mutate` damages bytes, values and texts; `cases` makes the inputs of each kind from a seed and
reads them; `guard` sees what a reader does that it must not; `worker` is the process; `fuzz` runs
it, and says what came of every case.
"""

import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .. import ROOT

SECONDS = 10.0  # of one case
START = 120.0  # until a worker has imported what it needs


@dataclass
class Found:
    """What came of the cases: how many of each outcome, and (kind, seed, what) of each fault."""

    outcomes: Counter = field(default_factory=Counter)
    faults: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())


def fuzz(folder: Path, kind: str, first: int, count: int, seconds: float = SECONDS) -> Found:
    """Cases first .. first + count - 1 of a kind. A worker that crashes or hangs is a fault of the
    case that it was at; another one goes on after it.
    """
    found, at = Found(), first
    while at < first + count:
        at = _until_it_dies(folder, kind, at, first + count - at, seconds, found)
    return found


def _until_it_dies(
    folder: Path, kind: str, first: int, count: int, seconds: float, found: Found
) -> int:
    """Cases of one worker; gives the seed of the next."""
    command = [sys.executable, "-m", "helpers.fuzzing.worker", str(folder), kind]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    worker = subprocess.Popen(
        [*command, str(first), str(count)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    at, patience, ready = first, START, False
    try:
        while at < first + count:
            line = _line(worker, patience)
            if line is None:
                worker.kill()
                return _fault(found, kind, at, f"hung for more than {patience:g} s")
            if not line:
                said = worker.communicate()[1].strip().splitlines()[-3:]
                if not ready:
                    raise RuntimeError(f"the worker of {kind} can't begin: {said}")
                return _fault(found, kind, at, f"exit {worker.returncode}: {said}")
            patience = seconds
            result = json.loads(line)
            if "ready" in result:
                ready = True
                continue
            found.outcomes[f"{kind}: {result['outcome']}"] += 1
            found.faults += [(kind, at, fault) for fault in result["faults"]]
            at += 1
        return at
    finally:
        worker.kill()
        worker.communicate()


def _line(worker: subprocess.Popen, seconds: float) -> str | None:
    """The worker's next line; "" if it has ended, None if it says nothing."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(worker.stdout, selectors.EVENT_READ)
        return worker.stdout.readline() if waiting.select(seconds) else None


def _fault(found: Found, kind: str, seed: int, what: str) -> int:
    found.outcomes[f"{kind}: died"] += 1
    found.faults.append((kind, seed, what))
    return seed + 1
