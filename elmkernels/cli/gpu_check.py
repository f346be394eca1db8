"""`elmkernels gpu-check`: all that one GPU can tell in a few minutes, stage by stage.

Every stage's result is in DIR/results.json as it comes; DIR/summary.md and the charts are made of
it at the end. `--continue` goes on from what is there, without what failed.

On a GPU the stages run in another process, which this one watches and ends if a unit hangs, to
go on with the next one in a fresh process. That worker is this command with --worker.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..bench.benchmark import Report, Results
from ..gpu_check.check import STAGES, GpuCheck, no_gpu
from ..gpu_check.stages import Clock, DeadDevice
from ..gpu_check.watch import Stuck, Worker, run_watched
from ..weights.texts import read_json
from .console import OK, CommandReport, Output, Progress, WrongInput, carry_out, note, words
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
        type=some_of(STAGES),
        metavar="NAME[,...]",
        help=f"{', '.join(STAGES)} (default: all)",
    )
    add("--continue", dest="go_on", action="store_true", help="do what DIR/results.json lacks")
    add(
        "--watch",
        action=argparse.BooleanOptionalAction,
        help="run the stages in another process, ended if one hangs (default: on a GPU)",
    )
    add_json(parser)
    add("--worker", type=float, metavar="SECONDS", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    check = _check(args)
    folder = Path(args.out)
    if args.worker is not None:
        return _work(check, args)
    earlier = None
    if args.go_on:
        earlier = {"stages": _earlier(folder, check.describe())}
    watched = check.device.type == "cuda" if args.watch is None else args.watch
    return carry_out(args, check, earlier, partial(_run, check, folder, watched))


def _run(check: GpuCheck, folder: Path, watched: bool, results: Results, report: Report) -> None:
    """Have everything done, in this process as long as that goes, unless it is to be watched."""
    clock = Clock(check.seconds)
    if watched:
        if results["busy"]:
            note(results["busy"])
    else:
        try:
            return check.run(results, report)
        except DeadDevice as error:
            note(f"{error} broke the device for this process; another one goes on")
    report.save()
    worker = Worker(
        _worker_command(check, folder), lambda: _read(folder), Output(str(folder)).save, note
    )
    try:
        run_watched(worker, clock)
    except Stuck as error:
        note(f"stopped: {error}")
    finally:
        results.update(_read(folder))


def _work(check: GpuCheck, args: argparse.Namespace) -> int:
    """What a worker does: go on with the results in the folder, as long as it is waited for."""
    output = Output(args.out)
    results, parent = _read(Path(args.out)), os.getppid()
    progress = Progress(check.stages)

    def save() -> None:
        output.save(results)
        if os.getppid() != parent:
            raise KeyboardInterrupt  # nobody reads on: the GPU is not ours any more

    try:
        check.run(results, CommandReport(progress, save, quiet=True))
    except DeadDevice:
        return BROKEN
    finally:
        progress.close()
        output.save(results)
    return OK


def _worker_command(check: GpuCheck, folder: Path) -> Callable[[float], list[str]]:
    options = [f"--out={folder}", f"--device={check.device}", f"--stages={','.join(check.wanted)}"]
    options += ["--quick"] if check.quick else []
    return lambda seconds: [*PROGRAM, NAME, *options, f"--worker={seconds:.1f}"]


def _check(args: argparse.Namespace) -> GpuCheck:
    quick = bool(args.quick)
    wanted = "cuda" if args.device is None else args.device
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise WrongInput(no_gpu())
    device = find_device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # the current one; asking for it would initialize CUDA
    if device.type == "cpu" and not quick:
        raise WrongInput("--device cpu is for the rehearsal alone: give --quick too")
    stages = tuple(args.stages or STAGES)
    minutes = args.minutes or (QUICK_MINUTES if quick else MINUTES)
    seconds = 60.0 * minutes if args.worker is None else args.worker
    return GpuCheck(device=device, seconds=seconds, quick=quick, wanted=stages)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "results.json"
    try:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist")
        return read_json(file)
    except (OSError, ValueError) as error:
        raise WrongInput(f"results can't be read: {words(error)}") from error


def _earlier(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The stages of a run that is to go on."""
    found = _read(folder)
    for name in ("command", "device", "quick"):
        if found.get(name) != new[name]:
            raise WrongInput(
                f"--continue: {folder / 'results.json'} is of {name} {found.get(name)!r}, "
                f"this run of {new[name]!r}"
            )
    stages = found.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise WrongInput(f"--continue: {folder / 'results.json'} must have an object of stages")
    for stage in stages.values():
        stage["left_out"] = {}  # there may be time for it now
    return stages
