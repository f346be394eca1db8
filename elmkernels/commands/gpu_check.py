"""`elmkernels gpu-check`: all that one GPU can tell in a few minutes, stage by stage.

Every stage's result is in DIR/results.json as it comes; DIR/summary.md and the charts are made of
it at the end. `--continue` goes on from what is there.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..console import (
    FAILED,
    INTERRUPTED,
    OK,
    Stages,
    WrongInput,
    add_shared,
    checked,
    find_device,
    measure,
    note,
    one_of,
    out_folder,
    plain,
    positive,
    replace_text,
    save,
)
from ..openelm import chart, gpu_check, gpu_report
from ..testing.stages import Clock, DeadDevice

NAME = "gpu-check"
MINUTES, QUICK_MINUTES = 8, 1


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        NAME, help="parity, memory errors, speed and models on one GPU, in a few minutes"
    )
    parser.allow_abbrev = False
    add_shared(parser, argparse.SUPPRESS)
    add = parser.add_argument
    add("--out", metavar="DIR", default=argparse.SUPPRESS, help="results.json, summary.md, charts")
    add("--quick", action="store_true", default=argparse.SUPPRESS, help="tiny shapes: a rehearsal")
    whole = f"the whole budget (default {MINUTES}, of --quick {QUICK_MINUTES})"
    add("--minutes", type=positive, help=whole)
    add(
        "--stages",
        type=one_of(gpu_check.STAGES, "stages"),
        metavar="NAME[,...]",
        help=f"{', '.join(gpu_check.STAGES)} (default: all)",
    )
    add("--continue", dest="go_on", action="store_true", help="do what DIR/results.json lacks")


def run(args: argparse.Namespace, version: str) -> int:
    """Carry out the command; returns its exit code. version: of elmkernels, for the results."""
    for name in ("dtype", "backend"):
        if getattr(args, name) is not None:
            raise WrongInput(f"--{name}: gpu-check takes every {name} in turn")
    if args.out is None:
        raise WrongInput("--out DIR is missing: where the results go")
    check = _check(args)
    folder = out_folder(args)
    if why := chart.available():
        note(why)
    results = {"elmkernels": version, **gpu_check.start(check)}
    if args.go_on:
        results |= {"stages": _earlier(folder, results), "complete": False}
    stages = Stages(gpu_check.steps(check))
    clock = Clock(check.seconds)

    def keep() -> None:
        save(folder, results)

    def work() -> None:
        try:
            gpu_check.run(check, results, stages, keep)
        except DeadDevice as error:
            keep()
            note(f"{error} broke the device for this process; another one goes on")
            try:
                _go_on_apart(check, folder, clock.left())
            finally:
                results.update(_read(folder))

    code = measure(args, stages, results, work)
    _report(args, plain(results), folder)
    return code or (OK if gpu_check.passed(results) else FAILED)


def _check(args: argparse.Namespace) -> gpu_check.Check:
    quick = bool(args.quick)
    wanted = "cuda" if args.device is None else args.device
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise WrongInput(gpu_check.no_gpu())
    device = find_device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu" and not quick:
        raise WrongInput("--device cpu is for the rehearsal alone: give --quick too")
    stages = tuple(args.stages or gpu_check.STAGES)
    minutes = args.minutes or (QUICK_MINUTES if quick else MINUTES)
    return gpu_check.Check(device, 60.0 * minutes, quick, stages)


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


def _go_on_apart(check: gpu_check.Check, folder: Path, seconds: float) -> None:
    """The rest in a fresh process, whose results are in the folder."""
    minutes = str(max(1, math.ceil(seconds / 60)))
    command = [sys.executable, "-m", "elmkernels", NAME, "--continue", f"--out={folder}"]
    command += [f"--device={check.device}", f"--minutes={minutes}"]
    command += [f"--stages={','.join(check.stages)}", *(["--quick"] if check.quick else [])]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code == INTERRUPTED:
        raise KeyboardInterrupt


def _report(args: argparse.Namespace, results: dict[str, Any], folder: Path) -> None:
    text = gpu_report.summary(results)
    checked(replace_text, folder / "summary.md", text)
    drawn = []
    if chart.available() is None:
        drawn = checked(gpu_report.draw, results, folder)
    if not args.json:
        print(text)
        print(f"{folder}: {', '.join(['results.json', 'summary.md', *drawn])}")
