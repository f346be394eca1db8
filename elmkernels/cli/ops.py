"""What `parity` and `bench ops` share: which ops by which backends, and one table of records."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from .. import __version__
from ..backends import BACKENDS, REFERENCE, choose
from ..bench.machine import busy
from ..bench.table import format_table
from ..bench.timing import fingerprint
from ..testing.cases import CASES
from ..testing.parity import RULE, runnable
from .console import FAILED, OK, Output, Progress, WrongInput, checked, measure, note
from .options import (
    Parser,
    add_backends,
    add_device,
    add_dtypes,
    add_json,
    add_out,
    find_device,
)

Keep = Callable[[Any], None]


def add_options(parser: Parser, default: str) -> None:
    """The options of both commands. default: the dtypes, in words."""
    parser.usage = f"{parser.prog} [op ...] [options]"
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help=f"{', '.join(CASES)} (default: all)",
    )
    add_device(parser)
    add_dtypes(parser, default)
    add_backends(parser)
    add_out(parser, "results.json")
    add_json(parser)


def run_records(
    args: argparse.Namespace,
    command: str,
    one: Callable[[str, str, torch.device, Keep], None],
    ok: Callable[[Any], bool],
    timed: bool,
) -> int:
    """Run every chosen op by every chosen backend; returns the exit code.

    one(op, backend, device, keep): gives `keep` each record as it comes. ok(record): whether its
    parity holds. timed: the records are of times, which other work distorts.
    """
    device = find_device(args.device)
    chosen = _chosen(args, device)
    records: list[Any] = []
    results = {
        "complete": False,
        "elmkernels": __version__,
        "command": args.command,
        "rule": RULE,
        "machine": fingerprint(device),
        **({"busy": busy()} if timed else {}),
        "records": [],
    }

    def keep(record: Any) -> None:
        records.append(record)
        results["records"].append(
            record.json() if hasattr(record, "json") else asdict(record) | {"ok": record.ok}
        )

    def work() -> None:
        for op, names in chosen.items():
            for name in names:
                progress(f"{command} {op} {name}")
                one(op, name, device, keep)
        results["complete"] = True

    output = Output(args.out, args.command)
    progress = Progress(sum(map(len, chosen.values())))
    code = measure(args, output, progress, results, work)
    failed = [record for record in records if not ok(record)]
    reason = results.get("busy")
    if not args.json:
        if records:
            print(format_table([r.row() for r in records]))
        print(f"{command}: {len(records)} records, {len(failed)} failed parity")
        if not timed:
            print(f"rule: {RULE}")
        if reason:
            print(reason)
    elif reason:
        note(reason)
    output.tell()
    return code or (FAILED if failed else OK)


def _chosen(args: argparse.Namespace, device: torch.device) -> dict[str, list[str]]:
    """{op: the backends to run}, of those that were named, or of all that can run here."""
    # Not while parsing, where the value of an option that doesn't exist would pass for an op.
    for op in args.ops:
        if op not in CASES:
            raise WrongInput(f"op must be one of {', '.join(CASES)}, got {op!r}")
    chosen = {}
    for op in dict.fromkeys(args.ops or CASES):
        able = runnable(op, device)
        wanted = able if args.backend is None else list(dict.fromkeys(args.backend))
        chosen[op] = [name for name in wanted if name in able]
        if args.ops and args.backend is not None:
            for name in wanted:
                if name not in able:
                    _refuse(op, name, device)
    if not any(chosen.values()):
        for name in args.backend or [b for b in BACKENDS if b != REFERENCE]:
            _refuse(next(iter(chosen)), name, device)
    return {op: names for op, names in chosen.items() if names}


def _refuse(op: str, name: str, device: torch.device) -> NoReturn:
    if name == REFERENCE:
        raise WrongInput("backend 'reference' is what the others are compared with")
    checked(choose, op, device.type, name)
    raise WrongInput(f"backend {name!r} can't run {op} on {device}")
