"""`elmkernels bench generate`: whole models side by side, ours and their baselines.

A baseline that isn't installed is named as missing, with what to install.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bench import chart, generation
from ..devices import backend_choices
from ..openelm.config import VARIANTS
from .console import (
    OK,
    Stages,
    WrongInput,
    checked,
    find_device,
    measure,
    note,
    one_of,
    out_folder,
    plain,
    positive,
    save,
)
from .model import chosen_model

NAME = "generate"
# Options of bench that the ops don't have.
OPTIONS = ("formats", "steps", "prompt", "prefill", "batch", "no_compile")


def add_options(parser: Any) -> None:
    """Add what `bench generate` takes to the options of bench."""
    group = parser.add_argument_group(
        "bench generate", "a whole model beside eager, torch.compile and llama.cpp, on a CPU"
    )
    add, absent = group.add_argument, argparse.SUPPRESS
    add("--model", default=absent, help=f"{', '.join(VARIANTS)}, with random weights")
    add("--checkpoint", metavar="PATH", default=absent, help="a folder, or CoreNet's .pt")
    add("--config", metavar="YAML|NAME", default=absent, help="the shape of a CoreNet checkpoint")
    add("--rounds", type=positive, default=absent, help="turns of each runner (default 5)")
    add("--seed", type=int, default=absent, help="of random weights and tokens (default 0)")
    add(
        "--formats",
        type=one_of(generation.FORMATS, "formats"),
        metavar="NAME[,...]",
        help=f"{', '.join(generation.FORMATS)} (default: all)",
    )
    add("--steps", type=positive, help="tokens to decode (default 128)")
    add("--prompt", type=positive, help="tokens before them, not timed (default 128)")
    add("--prefill", type=positive, help="tokens of the timed prompt (default 512)")
    add("--batch", type=positive, help="rows that decode together; 1: no such task (default 4)")
    add("--no-compile", action="store_true", default=None, help="leave torch.compile out")


def run(args: argparse.Namespace, version: str) -> int:
    """Carry out the command; returns its exit code. version: of elmkernels, for the results."""
    if args.dtype:
        raise WrongInput("--dtype belongs to bench of ops; bench generate takes --formats")
    if args.device is not None and find_device(args.device).type != "cpu":
        raise WrongInput(f"bench generate runs on a CPU, got --device {args.device}")
    backends = args.backend or [None]
    if len(backends) > 1:
        raise WrongInput(f"--backend takes one name here, got {', '.join(backends)}")
    checked(backend_choices, torch.device("cpu"), backends[0])
    sizes = generation.QUICK if args.quick else generation.Sizes()
    given = {
        name: getattr(args, name) for name in ("rounds", "steps", "prompt", "prefill", "batch")
    }
    sizes = replace(sizes, **{name: n for name, n in given.items() if n is not None})
    seed = args.seed or 0
    name, weights, load = chosen_model(args, torch.device("cpu"), seed, "OpenELM-270M")
    todo = generation.Race(
        lambda dtype: checked(load, dtype),
        name,
        weights,
        tuple(args.formats or generation.FORMATS),
        sizes,
        not args.no_compile,
        backends[0],
        seed,
    )
    folder = out_folder(args)
    if folder is not None and (why := chart.missing()):
        note(why)
    results = {"elmkernels": version, **generation.start(todo)}
    stages = Stages(todo.stages)
    emit = (lambda text: None) if args.json else stages.print

    def work() -> None:
        generation.run(todo, results, stages, emit, lambda: save(folder, results))

    code = measure(args, stages, results, work)
    if folder is not None and chart.missing() is None:
        title = f"{name} ({weights})"
        checked(chart.draw_race, title, plain(results["groups"]), Path(folder) / "chart.png")
    if code != OK and folder is None and not args.json:
        note("the groups that were measured are printed; --out keeps them in a file")
    return code
