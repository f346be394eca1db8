"""`elmkernels bench generate`: whole models side by side, ours and their baselines, on a CPU.

A baseline that isn't installed is named as missing, with what to install.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...bench.generation import FORMATS, Generation, GenerationSizes
from ...bench.runners import ROUNDED
from ...generation.drafts import LOOKUP, SELF
from ..console import WrongInput, carry_out
from ..options import (
    DEFAULT_MODEL,
    add_activations,
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
    note_missing,
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
    group, usual = parser.add_argument_group("what is run"), GenerationSizes()
    add = group.add_argument
    add(
        "--formats",
        type=some_of(FORMATS),
        metavar="NAME[,...]",
        help=f"{', '.join(FORMATS)} (default: all)",
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
    add(
        "--draft",
        metavar="NAME[,...]",
        type=lambda text: [name for name in text.split(",") if name],
        help=f"ours with a draft too: {LOOKUP}, {SELF} or the path of a model",
    )
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--seed", type=int, metavar="N", default=0, help="of random weights and tokens (default 0)")
    add_backend(group)
    add_activations(group)
    add_rounds(group, usual.rounds)
    add_quick(group)
    results = parser.add_argument_group("results")
    add_out(results)
    add_json(results)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    device = torch.device("cpu")
    check_backend(args.backend, device)
    name, weights, load = chosen_model(args, device, args.seed)
    for draft in args.draft or ():
        if draft not in (LOOKUP, SELF) and not Path(draft).exists():
            raise WrongInput(f"--draft must be {LOOKUP}, {SELF} or a checkpoint, got {draft!r}")
    benchmark = Generation(
        load=load,
        name=name,
        weights=weights,
        formats=tuple(args.formats or FORMATS),
        drafts=tuple(args.draft or ()),
        sizes=GenerationSizes.chosen(args.quick, {name: getattr(args, name) for name in SIZES}),
        compiled=not args.no_compile,
        backend=args.backend,
        activations=args.activations,
        seed=args.seed,
    )
    groups = benchmark.groups
    if args.activations is not None and not any(map(benchmark.rounded, groups)):
        raise WrongInput(
            f"--activations has no effect: of {', '.join(ROUNDED)} none is among --formats"
        )
    if args.no_compile and not any(group.compiled for group in groups):
        raise WrongInput(
            f"--no-compile has no effect: nothing is compiled beside {', '.join(benchmark.formats)}"
        )
    note_missing(device, args.backend)
    return carry_out(args, replace(benchmark, load=loaded_first(load, groups[0].dtype)))
