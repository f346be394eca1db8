"""`elmkernels bench train`: training steps side by side, time and memory."""

import argparse
from typing import Any

from ...bench.training_step import PRECISIONS, StepSizes, TrainingStep
from ...openelm.config import OpenELMConfig
from ..console import WrongInput, carry_out
from ..options import (
    DEFAULT_MODEL,
    add_backend,
    add_device,
    add_dtypes,
    add_json,
    add_out,
    add_quick,
    add_rounds,
    add_variant,
    check_backend,
    find_device,
    new_command,
    note_missing,
    positive,
)

NAME = "train"
SIZES = ("tokens", "batch", "rounds")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "a training step beside eager and torch.compile, time and memory",
        "Forward, loss and backward with float32 weights, in float32 or in bfloat16 by autocast.",
    )
    usual = StepSizes()
    add = parser.add_argument
    add_variant(parser, DEFAULT_MODEL)
    add("--tokens", type=positive, metavar="N", help=f"in a sequence (default {usual.tokens})")
    add("--batch", type=positive, metavar="N", help=f"sequences in a step (default {usual.batch})")
    add_device(parser)
    add_dtypes(parser, "both", PRECISIONS)
    add_backend(parser)
    add("--no-compile", action="store_true", help="leave torch.compile out, as --quick does")
    add("--seed", type=int, metavar="N", default=0, help="of random weights and tokens (default 0)")
    add_rounds(parser, usual.rounds)
    add_quick(parser)
    add_out(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    device = find_device(args.device)
    check_backend(args.backend, device)
    if args.no_compile and args.quick:
        raise WrongInput("--no-compile has no effect with --quick, which compiles nothing")
    benchmark = TrainingStep(
        config=OpenELMConfig.from_name(args.model or DEFAULT_MODEL),
        precisions=tuple(dict.fromkeys(args.dtype or PRECISIONS)),
        sizes=StepSizes.chosen(args.quick, {name: getattr(args, name) for name in SIZES}),
        compiled=not (args.no_compile or args.quick),
        backend=args.backend,
        seed=args.seed,
        device=device,
    )
    note_missing(device, args.backend)
    return carry_out(args, benchmark)
