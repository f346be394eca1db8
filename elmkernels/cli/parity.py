"""`elmkernels parity`: ops against their reference in float64, case by case."""

import argparse
from typing import Any

import torch

from ..testing.margins import run_margins
from ..testing.parity import run_parity
from .ops import Keep, add_options, run_records
from .options import dtypes_of, new_command

NAME = "parity"
DTYPES = ("fp32", "bf16", "fp16")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "every op against its reference, case by case",
        "Outputs and gradients may be off by little more than the reference's own rounding.",
    )
    add_options(parser, "all")
    parser.add_argument(
        "--margins",
        action="store_true",
        help="count the cases that pass by less than a third of what is allowed",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    dtypes = dtypes_of(args, DTYPES)

    def one(op: str, backend: str, device: torch.device, keep: Keep) -> None:
        if args.margins:
            run_margins([op], dtypes, [backend], device, keep)
        else:
            run_parity([op], dtypes, [backend], device, progress=keep)

    return run_records(args, NAME, one, lambda record: record.ok, timed=False)
