"""`elmkernels traffic`: what Triton's kernels would move on a GPU, counted on a CPU."""

import argparse
from importlib.util import find_spec
from typing import Any

from .. import __version__
from ..backends import traits
from ..bench.table import format_table
from ..testing.cases import CASES
from ..testing.ptx.meter import MODELS, ROWS, Pass, cases_of, measure
from .console import OK, Output, Progress, WrongInput, checked
from .console import measure as carried_out
from .options import add_dtypes, add_json, add_out, dtypes_of, new_command, positives, some_of

NAME = "traffic"
OPS = tuple(op for op in CASES if not traits(op).whole_model)


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "bytes, sectors and instructions of the Triton kernels, counted without a GPU",
        "The PTX for sm_80 is executed on the CPU. Multiples of the least bytes are what threads "
        "ask for, the 32-byte sectors of each access of a warp, and those that a launch touches; "
        "conflicts are cycles of shared memory beyond one an access, instructions those of threads "
        "for each element that is given.",
    )
    parser.usage = f"{parser.prog} [op ...] [options]"
    parser.add_argument("ops", nargs="*", metavar="op", help=f"{', '.join(OPS)} (default: all)")
    add_dtypes(parser, "bf16")
    parser.add_argument(
        "--model",
        type=some_of(MODELS),
        action="extend",
        metavar="NAME[,...]",
        help="whose widths the ops without products take (default: all four)",
    )
    parser.add_argument(
        "--rows",
        type=positives,
        action="extend",
        metavar="N[,...]",
        help=f"of them (default {ROWS})",
    )
    add_out(parser, "results.json")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    for op in args.ops:
        if op not in OPS:
            raise WrongInput(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if find_spec("triton") is None:
        raise WrongInput("traffic needs Triton, which is not installed: pip install triton")
    from triton import knobs

    if knobs.runtime.interpret:
        raise WrongInput("traffic needs Triton's compiler: unset TRITON_INTERPRET")
    ops, dtypes = tuple(dict.fromkeys(args.ops or OPS)), dtypes_of(args, ("bf16",))
    passes: list[Pass] = []
    results: dict[str, Any] = {
        "complete": False,
        "elmkernels": __version__,
        "command": args.command,
        "architecture": "sm_80",
        "records": [],
    }

    def work() -> None:
        for op in ops:
            progress(f"{NAME} {op}")
            for case in checked(cases_of, op, args.rows or (ROWS,), args.model or MODELS):
                for dtype in dtypes:
                    for one in measure(op, case, dtype) if dtype in case.dtypes else ():
                        passes.append(one)
                        results["records"].append(one.json())
        results["complete"] = True

    output, progress = Output(args.out, args.command), Progress(len(ops))
    code = carried_out(args, output, progress, results, work)
    if passes and not args.json:
        print(format_table([one.row() for one in passes]))
    output.tell()
    return code or OK
