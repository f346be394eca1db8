"""`elmkernels bench ops`: every op beside its baselines, forward and forward + backward."""

import argparse
from typing import Any

import torch

from ...bench.ops import run_bench
from ..ops import Keep, add_options, run_records
from ..options import add_quick, dtypes_of, new_command

NAME = "ops"
DTYPES = ("fp32", "bf16")


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "every op beside its baselines",
        "Baselines are the reference, torch's own operations and torch.compile; they take turns.",
    )
    add_options(parser, ", ".join(DTYPES))
    add_quick(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    dtypes = dtypes_of(args, DTYPES)

    def one(op: str, backend: str, device: torch.device, keep: Keep) -> None:
        run_bench([op], dtypes, [backend], device, quick=args.quick, progress=keep)

    return run_records(args, "bench", one, lambda record: record.parity, timed=True)
