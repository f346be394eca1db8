"""`elmkernels bench paper`: the comparison of OpenELM's paper, on this machine's CPU."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from ...bench.paper import CHOICES, Paper, PaperSizes
from ..console import WrongInput, carry_out
from ..options import (
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

NAME = "paper"
MODEL = "OpenELM-1_1B"
SIZES = ("rounds", "steps", "prompt")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "OpenELM naive, fused and accelerated beside OLMo and Llama, on a CPU",
        "Tokens/s of a prompt, of generation and of both, in bfloat16; all take turns.",
    )
    add_model(parser, MODEL)
    group, usual = parser.add_argument_group("what is run"), PaperSizes()
    add = group.add_argument
    add(
        "--models",
        type=some_of(CHOICES),
        metavar="NAME[,...]",
        help=f"{', '.join(CHOICES)} (default: all)",
    )
    add("--prompt", type=positive, metavar="N", help=f"tokens of it (default {usual.prompt})")
    add("--steps", type=positive, metavar="N", help=f"tokens after it (default {usual.steps})")
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
    if args.model is None and args.checkpoint is None:
        args.model = MODEL
    name, weights, load = chosen_model(args, device, args.seed)
    benchmark = Paper(
        load=load,
        name=name,
        weights=weights,
        choices=tuple(args.models or CHOICES),
        sizes=PaperSizes.chosen(args.quick, {name: getattr(args, name) for name in SIZES}),
        compiled=not args.no_compile,
        tiny=args.quick,
        backend=args.backend,
        seed=args.seed,
    )
    if args.no_compile and not benchmark.peers:
        raise WrongInput(
            f"--no-compile has no effect: nothing is compiled beside {', '.join(benchmark.choices)}"
        )
    note_missing(device, args.backend)
    return carry_out(args, replace(benchmark, load=loaded_first(load, torch.bfloat16)))
