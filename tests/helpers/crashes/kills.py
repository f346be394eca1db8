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


def ended(pid: int, deadline: float) -> int | None:
    """The exit status of a run that ends by itself before the deadline, else None."""
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    return None


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
    status = ended(forked(recipe, where / "whole"), begin + 120)
    if status != 0:
        raise SystemExit(f"the run that nobody kills ended with {status}")
    whole_time = time.monotonic() - begin
    hit: Counter[str] = Counter()
    unequal, rounds = [], 0
    while hit.total() < int(kills):
        out = where / f"out-{rounds}"
        rounds += 1
        while True:
            pid = forked(recipe, out)
            # Towards the end of the quota the last run is let go on.
            patience = 120.0
            if hit.total() < int(kills):
                patience = chance.uniform(0, 1.1) * whole_time
            status = ended(pid, time.monotonic() + patience)
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
