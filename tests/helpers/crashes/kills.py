"""Training that is killed at random moments: kills.py RECIPE FOLDER KILLS SEED.

Every run is a fork of this process, which has imported all that a run needs, so that a kill costs a
second and not five. A run that is killed is begun again on the same OUT until it ends by itself;
then its models must be those of the run that nobody killed, to the bit, and the next OUT begins.
It prints a line of JSON: what was hit, and what was not equal.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from elmkernels.cli.main import main as command
from elmkernels.training import run, speed, state  # noqa: F401  (imported before the forks)

from ..runs import losses, weights


def forked(recipe: str, out: Path) -> int:
    """A run in a process of its own; gives its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        code = command(["train", recipe, "--out", str(out)])
    finally:
        os._exit(code)


def ended(pid: int, seconds: float, log: Path | None = None) -> int | None:
    """The exit status of a run that ends by itself within so many seconds, else None. log: a file
    that must grow before they are counted.
    """
    size, deadline = length(log), time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if log is not None and length(log) == size:
            deadline = time.monotonic() + seconds
        time.sleep(0.002)
    return None


def length(file: Path | None) -> int:
    return file.stat().st_size if file is not None and file.exists() else 0


def moment(out: Path) -> str:
    """What a killed run had come to."""
    if (out / ".final.partial").exists() or (out / ".average.partial").exists():
        return "writing a model"
    if (out / "final").exists():
        return "after the model"
    steps = [p.name for p in (out / "checkpoints").glob("*")] if out.exists() else []
    if any(name.endswith(".partial") for name in steps):
        return "writing a checkpoint"
    if any(not name.startswith(".") for name in steps):
        return "between checkpoints"
    if (out / "train.jsonl").exists():
        return "before the first checkpoint"
    return "before the first step"


def differences(out: Path, whole: Path) -> list[str]:
    """What isn't the bits of the run that nobody killed."""
    found = []
    for which in ("final", "average"):
        a, b = weights(out, which), weights(whole, which)
        same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        found += [] if same else [which]
    return found + ([] if losses(out) == losses(whole) else ["losses"])


def main(recipe: str, folder: str, kills: str, seed: str) -> None:
    chance, where = random.Random(int(seed)), Path(folder)
    speed.peak(torch.float32, torch.device("cpu"))  # measured once, here, and not in every fork
    begin = time.monotonic()
    pid, log = forked(recipe, where / "whole"), where / "whole" / "train.jsonl"
    while not length(log) and time.monotonic() < begin + 120:
        time.sleep(0.002)
    first_line = time.monotonic()
    if status := ended(pid, 120.0):
        raise SystemExit(f"the run that nobody kills ended with {status}")
    whole_time, steps_time = time.monotonic() - begin, time.monotonic() - first_line
    hit: Counter[str] = Counter()
    unequal, rounds = [], 0
    while hit.total() < int(kills):
        out = where / f"out-{rounds}"
        rounds += 1
        while True:
            pid = forked(recipe, out)
            if hit.total() >= int(kills):  # the last run is let go on
                status = ended(pid, 120.0)
            elif chance.random() < 0.5:
                status = ended(pid, chance.uniform(0, 1.1) * whole_time)
            else:  # its steps are the shorter part of so small a run
                seconds = chance.uniform(0, 1.1) * steps_time
                status = ended(pid, seconds, out / "train.jsonl")
            if status is not None:
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            hit[moment(out)] += 1
        if status != 0:
            unequal.append([rounds, f"exit {status}"])
        elif different := differences(out, where / "whole"):
            unequal.append([rounds, *different])
    print(json.dumps({"kills": hit.total(), "runs": rounds, "hit": hit, "unequal": unequal}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
