"""`elmkernels bench generate`: whole models side by side, ours and their baselines, on a CPU.

A baseline that isn't installed is named as missing, with what to install.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from .. import __version__
from ..bench import chart, generation
from .console import OK, Output, Progress, WrongInput, measure, note, plain
from .options import (
    DEFAULT_MODEL,
    add_backend,
    add_json,
    add_model,
    add_out,
    add_quick,
    add_rounds,
    check_backend,
    chosen_model,
    loaded_first,
    new_command,
    positive,
    some_of,
)

NAME = "generate"
SIZES = ("rounds", "steps", "prompt", "prefill", "batch")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "a whole model beside eager, torch.compile and llama.cpp, on a CPU",
        "Each format of the weights has its baselines; they take turns.",
    )
    add_model(parser, DEFAULT_MODEL)
    group, usual = parser.add_argument_group("what is run"), generation.Sizes()
    add = group.add_argument
    add(
        "--formats",
        type=some_of(generation.FORMATS),
        metavar="NAME[,...]",
        help=f"{', '.join(generation.FORMATS)} (default: all)",
    )
    add("--steps", type=positive, metavar="N", help=f"tokens to decode (default {usual.steps})")
    add(
        "--prompt",
        type=positive,
        metavar="N",
        help=f"tokens before them, not timed (default {usual.prompt})",
    )
    add(
        "--prefill",
        type=positive,
        metavar="N",
        help=f"tokens of the timed prompt (default {usual.prefill})",
    )
    add(
        "--batch",
        type=positive,
        metavar="N",
        help=f"rows that decode together; 1: no such task (default {usual.batch})",
    )
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--seed", type=int, metavar="N", default=0, help="of random weights and tokens (default 0)")
    add_backend(group)
    add_rounds(group, usual.rounds)
    add_quick(group)
    results = parser.add_argument_group("results")
    add_out(results)
    add_json(results)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    device = torch.device("cpu")
    check_backend(args.backend, device)
    sizes = generation.QUICK if args.quick else generation.Sizes()
    given = {name: getattr(args, name) for name in SIZES}
    sizes = replace(sizes, **{name: n for name, n in given.items() if n is not None})
    name, weights, load = chosen_model(args, device, args.seed)
    todo = generation.Race(
        load,
        name,
        weights,
        tuple(args.formats or generation.FORMATS),
        sizes,
        not args.no_compile,
        args.backend,
        args.seed,
    )
    if args.no_compile and not any(group.compiled for group in todo.groups):
        raise WrongInput(
            f"--no-compile has no effect: nothing is compiled beside {', '.join(todo.formats)}"
        )
    todo = replace(todo, load=loaded_first(load, todo.groups[0].dtype))
    output = Output(args.out, charts=True)
    results = {"elmkernels": __version__, **generation.start(todo)}
    progress = Progress(todo.stages)
    emit = (lambda text: None) if args.json else progress.print

    def work() -> None:
        generation.run(todo, results, progress, emit, lambda: output.save(results))

    code = measure(args, output, progress, results, work)
    title, groups = f"{name} ({weights})", plain(results["groups"])
    output.draw(lambda path: chart.draw_race(title, groups, path))
    output.tell()
    if code != OK and output.folder is None and not args.json:
        note("the groups that were measured are printed; --out keeps them in a file")
    return code
