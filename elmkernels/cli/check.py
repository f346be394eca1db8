"""`elmkernels check`: accelerate a copy of a model, prove it against the reference, time both."""

import argparse
from typing import Any

from ..bench.end_to_end import EndToEnd, EndToEndSizes
from .console import WrongInput, carry_out
from .options import (
    DEFAULT_MODEL,
    add_backend,
    add_device,
    add_dtypes,
    add_json,
    add_model,
    add_out,
    add_quick,
    add_rounds,
    check_backend,
    chosen_model,
    dtypes_of,
    find_device,
    loaded_first,
    new_command,
)

NAME = "check"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "accelerate a copy of a model, compare it with the reference, time both (the default)",
        "It compares logits, losses and every gradient, then times prefill, generation and a "
        "training step side by side.",
    )
    add_model(parser, DEFAULT_MODEL)
    how = parser.add_argument_group("how it runs")
    add_device(how)
    add_dtypes(how, "bf16, and fp32 on a CPU")
    add_backend(how)
    how.add_argument(
        "--prepack",
        action="store_true",
        default=None,
        help="keep weights in oneDNN's layout wherever it is faster (CPU; default: where it pays)",
    )
    how.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of random weights and tokens (default 0)"
    )
    add_rounds(how, EndToEndSizes().rounds)
    add_quick(how)
    results = parser.add_argument_group("results")
    add_out(results)
    add_json(results)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    device = find_device(args.device)
    check_backend(args.backend, device)
    if args.prepack and device.type != "cpu":
        raise WrongInput(f"--prepack is for a CPU, it has no effect on {device}")
    dtypes = dtypes_of(args, ("bf16", "fp32") if device.type == "cpu" else ("bf16",))
    name, weights, load = chosen_model(args, device, args.seed)
    benchmark = EndToEnd(
        load=loaded_first(load, dtypes[0]),
        name=name,
        weights=weights,
        dtypes=dtypes,
        device=device,
        sizes=EndToEndSizes.chosen(args.quick, {"rounds": args.rounds}),
        quick=args.quick,
        backend=args.backend,
        prepack=args.prepack,
        seed=args.seed,
    )
    return carry_out(args, benchmark)
