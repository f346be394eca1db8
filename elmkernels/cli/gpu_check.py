"""`elmkernels gpu-check`: all that one GPU can tell in a few minutes, stage by stage.

Every stage's result is in DIR/results.json as it comes; DIR/summary.md and the charts are made of
it at the end. `--continue` goes on from what is there, without what failed.

On a GPU the stages run in another process, which this one watches and ends where a unit hangs, to
go on with the next one in a fresh process. That worker is this command with --worker.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..bench import chart
from ..gpu_check import check as gpu_check
from ..gpu_check import report
from ..gpu_check.stages import Clock, DeadDevice
from ..gpu_check.watch import Stuck, Worker, run_watched
from .console import FAILED, OK, Output, Progress, WrongInput, checked, measure, note, plain
from .options import (
    add_device,
    add_json,
    find_device,
    new_command,
    positive,
    some_of,
)

NAME = "gpu-check"
MINUTES, QUICK_MINUTES = 8, 1
BROKEN = 4  # the exit code of a worker whose device works no more
PROGRAM = (sys.executable, "-m", "elmkernels")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "parity, memory errors, speed and models on one GPU, in a few minutes",
        "`--device cpu --quick` is a rehearsal without a GPU.",
    )
    parser.usage = f"{parser.prog} --out DIR [options]"
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="for results.json, summary.md and charts")
    add_device(parser)
    add("--quick", action="store_true", help="tiny shapes: a rehearsal")
    whole = f"the whole budget (default {MINUTES}, of --quick {QUICK_MINUTES})"
    add("--minutes", type=positive, metavar="N", help=whole)
    add(
        "--stages",
        type=some_of(gpu_check.STAGES),
        metavar="NAME[,...]",
        help=f"{', '.join(gpu_check.STAGES)} (default: all)",
    )
    add("--continue", dest="go_on", action="store_true", help="do what DIR/results.json lacks")
    add(
        "--watch",
        action=argparse.BooleanOptionalAction,
        help="run the stages in another process, ended where one hangs (default: on a GPU)",
    )
    add_json(parser)
    add("--worker", type=float, metavar="SECONDS", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    check = _check(args)
    output = Output(args.out, charts=args.worker is None)
    folder = Path(args.out)
    if args.worker is not None:
        return _work(check, output)
    results = {"elmkernels": __version__, **gpu_check.start(check)}
    if args.go_on:
        results |= {"stages": _earlier(folder, results), "complete": False}
    if results["busy"]:
        note(results["busy"])
    watched = check.device.type == "cuda" if args.watch is None else args.watch
    progress = None if watched else Progress(gpu_check.steps(check))
    clock = Clock(check.seconds)

    def keep() -> None:
        output.save(results)

    def here() -> bool:
        """Whether all could be done in this process."""
        try:
            gpu_check.run(check, results, progress, keep)
        except DeadDevice as error:
            note(f"{error} broke the device for this process; another one goes on")
            return False
        return True

    def work() -> None:
        if not watched and here():
            return
        keep()
        worker = Worker(_worker_command(check, folder), lambda: _read(folder), output.save, note)
        try:
            run_watched(worker, clock)
        except Stuck as error:
            note(f"stopped: {error}")
        finally:
            results.update(_read(folder))

    code = measure(args, output, progress, results, work)
    _report(args, plain(results), output, folder)
    return code or (OK if results["complete"] and gpu_check.passed(results) else FAILED)


def _work(check: gpu_check.Check, output: Output) -> int:
    """What a worker does: go on with the results in the folder, as long as it is waited for."""
    results, parent = _read(output.folder), os.getppid()
    progress = Progress(gpu_check.steps(check))

    def keep() -> None:
        output.save(results)
        if os.getppid() != parent:
            raise KeyboardInterrupt  # nobody reads on: the GPU is not ours any more

    try:
        gpu_check.run(check, results, progress, keep)
    except DeadDevice:
        return BROKEN
    finally:
        progress.close()
        output.save(results)
    return OK


def _worker_command(check: gpu_check.Check, folder: Path) -> Callable[[float], list[str]]:
    options = [f"--out={folder}", f"--device={check.device}", f"--stages={','.join(check.stages)}"]
    options += ["--quick"] if check.quick else []
    return lambda seconds: [*PROGRAM, NAME, *options, f"--worker={seconds:.1f}"]


def _check(args: argparse.Namespace) -> gpu_check.Check:
    quick = bool(args.quick)
    wanted = "cuda" if args.device is None else args.device
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise WrongInput(gpu_check.no_gpu())
    device = find_device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # the current one; asking for it would initialize CUDA
    if device.type == "cpu" and not quick:
        raise WrongInput("--device cpu is for the rehearsal alone: give --quick too")
    stages = tuple(args.stages or gpu_check.STAGES)
    minutes = args.minutes or (QUICK_MINUTES if quick else MINUTES)
    seconds = 60.0 * minutes if args.worker is None else args.worker
    return gpu_check.Check(device, seconds, quick, stages)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise WrongInput(f"results can't be read: {error}") from error


def _earlier(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The stages of a run that is to go on."""
    found = _read(folder)
    for name in ("command", "device", "quick"):
        if found.get(name) != new[name]:
            raise WrongInput(
                f"--continue: {folder / 'results.json'} is of {name} {found.get(name)!r}, "
                f"this run of {new[name]!r}"
            )
    for stage in found["stages"].values():
        stage["left_out"] = {}  # there may be time for it now
    return found["stages"]


def _report(
    args: argparse.Namespace, results: dict[str, Any], output: Output, folder: Path
) -> None:
    text = report.summary(results)
    output.write("summary.md", text)
    if chart.missing() is None:
        output.files |= dict.fromkeys(checked(report.draw, results, folder))
    if not args.json:
        print(text)
    output.tell()
