"""`elmkernels bench train`: training steps side by side, time and memory."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bench import chart, training_step
from ..devices import backend_choices
from ..openelm.config import OpenELMConfig
from .console import (
    FAILED,
    OK,
    Stages,
    WrongInput,
    checked,
    find_device,
    measure,
    note,
    out_folder,
    plain,
    positive,
    save,
)
from .model import variant

NAME = "train"
OPTIONS = ("tokens", "batch", "no_compile")  # those of bench that the ops don't have


def add_options(parser: Any) -> None:
    """Add what `bench train` takes beyond the options of `bench generate`."""
    group = parser.add_argument_group("bench train", "a training step beside eager and compiled")
    group.add_argument("--tokens", type=positive, help="in a sequence (default 512)")


def run(args: argparse.Namespace, version: str) -> int:
    """Carry out the command; returns its exit code. version: of elmkernels, for the results."""
    backends = args.backend or [None]
    if len(backends) > 1:
        raise WrongInput(f"--backend takes one name here, got {', '.join(backends)}")
    if args.checkpoint is not None:
        raise WrongInput("bench train draws random weights: --model, not --checkpoint")
    device = find_device(args.device)
    checked(backend_choices, device, backends[0])
    precisions = tuple(dict.fromkeys(args.dtype or training_step.PRECISIONS))
    if "fp16" in precisions:
        raise WrongInput("--dtype must be bf16 or fp32 for bench train, got fp16")
    sizes = training_step.QUICK if args.quick else training_step.Sizes()
    given = {"tokens": args.tokens, "batch": args.batch, "rounds": args.rounds}
    sizes = replace(sizes, **{name: n for name, n in given.items() if n is not None})
    config = OpenELMConfig.from_name(variant(args.model, "OpenELM-270M"))
    compiled = not (args.no_compile or args.quick)
    race = training_step.StepRace(
        config, precisions, sizes, compiled, backends[0], args.seed or 0, device
    )
    folder = out_folder(args)
    if folder is not None and (why := chart.missing()):
        note(why)
    results = {"elmkernels": version, **training_step.start(race)}
    stages = Stages(race.stages)
    emit = (lambda text: None) if args.json else stages.print

    def work() -> None:
        training_step.run(race, results, stages, emit, lambda: save(folder, results))

    code = measure(args, stages, results, work)
    if folder is not None and chart.missing() is None:
        found = {name: [task] for name, task in plain(results["precisions"]).items()}
        checked(chart.draw, f"{config.model_name}, training", found, Path(folder) / "chart.png")
    return code or (OK if results["parity"] else FAILED)
