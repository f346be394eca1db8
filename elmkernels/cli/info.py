"""`elmkernels info`: what can run here, and why the rest can't."""

import argparse
import platform
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy
import torch

from .. import __version__
from ..acceleration.routines import measure_plan
from ..backends import BACKENDS, build_report, choose, defined
from ..bench import tune
from ..bench.machine import busy
from ..bench.table import format_table
from ..bench.timing import fingerprint
from ..devices import gpus, no_cuda
from ..processors import KIND
from .console import OK, Progress, WrongInput, dump
from .options import (
    add_backends,
    add_device,
    add_dtypes,
    add_json,
    dtypes_of,
    find_device,
    new_command,
)

NAME = "info"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(commands, NAME, run, "what can run here, and why the rest can't")
    add_device(parser)
    add_backends(parser)
    parser.add_argument(
        "--gemm", action="store_true", help="measure the routines of the projections on this CPU"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure what this kind of processor decides: rows that hold, rows to add (a minute)",
    )
    add_dtypes(parser, "all, for --gemm")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    if args.dtype and not args.gemm:
        raise WrongInput("--dtype belongs to --gemm, which is missing")
    devices = [find_device(args.device).type] if args.device else ["cpu", "cuda"]
    if not torch.cuda.is_available():
        devices = [d for d in devices if d != "cuda"]
    names = args.backend or list(BACKENDS)
    machine = fingerprint("cpu" if devices == ["cpu"] else "cuda")
    found: dict[str, Any] = {
        "elmkernels": __version__,
        "numpy": numpy.__version__,
        **machine,
        "instruction sets": _instruction_sets(),
        "devices": devices,
        "backends": {
            b.name: {"devices": b.devices, "available": b.missing is None, "missing": b.missing}
            for b in BACKENDS.values()
            if b.name in names
        },
        "gpus": gpus() if args.device is None or "cuda" in devices else None,
        "built": build_report(),
        "ops": {op: {d: choose(op, d, None) for d in devices} for op in defined()},
    }
    if args.gemm:
        found["busy"] = busy()
        found["gemm"] = {
            str(dtype).removeprefix("torch."): asdict(measure_plan(dtype))
            for dtype in dtypes_of(args, ("fp32", "bf16", "fp16"))
        }
    if args.tune:
        found["busy"] = found.get("busy") or busy()
        found["processor"] = KIND
        found["tuned"] = [finding.json() for finding in _tuned()]
    print(dump(found) if args.json else _text(found))
    return OK


def _tuned() -> list[tune.Finding]:
    progress = Progress(len(tune.TASKS))
    try:
        return list(tune.findings(note=progress))
    finally:
        progress.close()


def _instruction_sets() -> list[str]:
    """What torch finds in this processor."""
    probes = ("avx2", "avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    return [p for p in probes if getattr(torch.cpu, f"_is_{p}_supported", lambda: False)()]


def _text(found: dict[str, Any]) -> str:
    def line(key: str, value: Any) -> str:
        return f"{key:<17} {', '.join(value) if isinstance(value, list) else value}"

    facts = {k: v for k, v in found.items() if not isinstance(v, dict) and v is not None}
    facts.pop("tuned", None)
    found_gpus, reason = facts.pop("gpus", None), facts.pop("busy", None)
    lines = [line(key, value) for key, value in facts.items()]
    lines.append("\nbackends")
    for name, b in found["backends"].items():
        state = "available" if b["available"] else f"missing: {b['missing']}"
        lines.append(line(f"  {name}", f"{'/'.join(b['devices'])}, {state}"))
    if found_gpus is not None:
        lines.append("\nGPUs")
        lines += [text for g in found_gpus for text in _gpu_lines(g, line)] or [
            f"  none: {no_cuda()}"
        ]
    if found["built"]:
        lines.append("\nbuilt at installation")
        lines += [line(f"  {name}", state) for name, state in found["built"].items()]
    lines.append("\nops")
    for op, chosen in found["ops"].items():
        lines.append(line(f"  {op}", [f"{d}: {name}" for d, name in chosen.items()]))
    if "gemm" in found:
        lines.append("\nprojections (measured now)")
        rows = [{"dtype": dtype, **plan} for dtype, plan in found["gemm"].items()]
        lines.append(format_table(rows))
    if "tuned" in found:
        lines.append(f"\nwhat a processor of the kind {found['processor']} decides (measured now)")
        measured = [tune.Finding(**{k: v for k, v in f.items() if k != "holds"})
                    for f in found["tuned"]]  # fmt: skip
        lines += [format_table([f.row() for f in measured]), *tune.lines(measured)]
    lines += [reason] if reason else []
    return "\n".join(lines)


def _gpu_lines(found: dict[str, Any], line: Callable[[str, Any], str]) -> list[str]:
    """A GPU, and below it which backends fit it."""
    size = f"{found['memory'] / 2**30:.0f} GiB"
    what = f"{found['name']}, compute capability {found['capability']}, {size}"
    fit = {
        name: f"can't run there: {missing}" if missing else "fits"
        for name, missing in found["backends"].items()
    }
    return [line(f"  {found['device']}", what), *(line(f"    {n}", f) for n, f in fit.items())]
