"""The command line: `elmkernels`, or `python -m elmkernels`.

Without a command it swaps a copy of a model, proves it against the reference and times both.
Exit codes: 0 all is well, 1 a parity failed, 2 wrong input (one line on stderr), 130 interrupted
(what was measured by then is printed and kept).
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

from . import __version__
from .backends import BACKENDS, REFERENCE, build_report, choose
from .console import (
    FAILED,
    INTERRUPTED,
    OK,
    PIPE_CLOSED,
    WRONG,
    Parser,
    Stages,
    WrongInput,
    add_files,
    add_shared,
    checked,
    dtypes_of,
    dump,
    find_device,
    measure,
    note,
    out_folder,
    plain,
    positive,
)
from .openelm import chart, job
from .openelm.config import VARIANTS
from .openelm.linear import measure_plan
from .openelm.swap import OPS
from .testing import CASES, fingerprint, format_table, run_bench, run_parity, runnable

MAIN_ONLY = ("model", "checkpoint", "config", "rounds", "seed", "pack_weights")


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="elmkernels",
        allow_abbrev=False,
        description="Without a command: swap a copy of an OpenELM model, compare it with the "
        "reference (logits, loss, every gradient) and time both side by side.",
    )
    parser.add_argument("--version", action="version", version=f"elmkernels {__version__}")
    add_shared(parser)
    add_files(parser, None)
    add = parser.add_argument
    add("--model", help=f"{', '.join(VARIANTS)}, with random weights (default: OpenELM-270M)")
    add("--checkpoint", metavar="PATH", help="a Hugging Face folder, or CoreNet's .pt (--config)")
    add("--config", metavar="YAML|NAME", help="the shape of a CoreNet checkpoint")
    add("--rounds", type=positive, help="measurements of each task (default 5)")
    add("--seed", type=int, help="of random weights and tokens (default 0)")
    add("--pack-weights", action="store_true", default=None, help="see accelerate")
    commands = parser.add_subparsers(dest="command", metavar="info | parity | bench")
    absent = argparse.SUPPRESS
    info = commands.add_parser("info", help="what can run here, and why the rest can't")
    info.add_argument("--gemm", action="store_true", help="measure the projections' routines")
    parity = commands.add_parser("parity", help="ops against their reference, case by case")
    bench = commands.add_parser("bench", help="ops beside their rivals")
    for command in (info, parity, bench):
        command.allow_abbrev = False
        add_shared(command, absent)
    for command in (parity, bench):
        command.add_argument("ops", nargs="*", metavar="op", help=", ".join(CASES))
        add_files(command, absent, quick=command is bench)
    return parser


def _main_job(args: argparse.Namespace) -> int:
    device = find_device(args.device)
    default = ("bf16", "fp32") if device.type == "cpu" else ("bf16",)
    backends = args.backend or [None]
    if len(backends) > 1:
        raise WrongInput(f"--backend takes one name here, got {', '.join(backends)}")
    for op in OPS:
        checked(choose, op, device.type, backends[0])
    out_folder(args)
    sizes = job.QUICK if args.quick else job.Sizes()
    sizes = replace(sizes, rounds=args.rounds or sizes.rounds)
    dtypes, seed = dtypes_of(args, default), args.seed or 0
    name, weights, load = _model(args, device, seed)
    first = checked(load, dtypes[0])
    loaded = {dtypes[0]: first}
    del first

    def take(dtype: torch.dtype) -> Any:
        return loaded.pop(dtype) if dtype in loaded else checked(load, dtype)

    todo = job.Job(
        take,
        name,
        weights,
        dtypes,
        device,
        sizes,
        quick=bool(args.quick),
        backend=backends[0],
        pack_weights=bool(args.pack_weights),
        seed=seed,
    )
    if args.out is not None and (why := chart.available()):
        note(why)
    results = {"elmkernels": __version__, **job.start(todo)}
    stages = Stages(len(job.STAGES) * len(dtypes))
    emit = (lambda text: None) if args.json else stages.print
    code = measure(args, stages, results, lambda: job.run(todo, results, stages, emit))
    if args.out is not None and chart.available() is None:
        speeds = {dtype: found["speed"] for dtype, found in plain(results["dtypes"]).items()}
        checked(chart.draw, f"{name} ({weights})", speeds, Path(args.out) / "chart.png")
    return code or (OK if job.passed(results) else FAILED)


def _model(
    args: argparse.Namespace, device: torch.device, seed: int
) -> tuple[str, str, Callable[[torch.dtype], Any]]:
    """The model's name, where its weights come from, and how to get it in a dtype."""
    if args.checkpoint is None:
        if args.config is not None:
            raise WrongInput("--config describes a --checkpoint, which is missing")
        short = (args.model or "OpenELM-270M").upper().removeprefix("OPENELM-").replace(".", "_")
        name = f"OpenELM-{short}"
        if name not in VARIANTS:
            raise WrongInput(f"--model must be one of {', '.join(VARIANTS)}, got {args.model!r}")
        load = job.weights_of(None, None, name, seed, device)
        return name, f"random weights of seed {seed}", load
    if args.model is not None:
        raise WrongInput("--model draws random weights: give it or --checkpoint, not both")
    path = Path(args.checkpoint)
    load = job.weights_of(path, args.config, "", seed, device)
    return path.resolve().stem if path.is_file() else path.resolve().name, f"from {path}", load


def _ops(args: argparse.Namespace, device: torch.device) -> dict[str, list[str]]:
    """{op: the backends to run}, of those that were named, or of all that can run here."""
    unknown = [op for op in args.ops if op not in CASES]
    if unknown:
        raise WrongInput(f"op must be one of {', '.join(CASES)}, got {unknown[0]!r}")
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


def _op_job(args: argparse.Namespace) -> int:
    """parity and bench: records of ops, printed as one table."""
    device = find_device(args.device)
    chosen = _ops(args, device)
    benching = args.command == "bench"
    dtypes = dtypes_of(args, ("fp32", "bf16") if benching else ("fp32", "bf16", "fp16"))
    records: list[Any] = []
    results = {
        "complete": False,
        "elmkernels": __version__,
        "command": args.command,
        "machine": fingerprint(device),
        "records": [],
    }

    def keep(record: Any) -> None:
        records.append(record)
        found = record.json() if benching else asdict(record) | {"ok": record.ok}
        results["records"].append(found)

    def work() -> None:
        for op, names in chosen.items():
            for name in names:
                stages(f"{args.command} {op} {name}")
                if benching:
                    quick = bool(args.quick)
                    run_bench([op], dtypes, [name], device, quick=quick, progress=keep)
                else:
                    run_parity([op], dtypes, [name], device, progress=keep)
        results["complete"] = True

    stages = Stages(sum(map(len, chosen.values())))
    code = measure(args, stages, results, work)
    failed = [r for r in records if not (r.parity if benching else r.ok)]
    if not args.json:
        if records:
            print(format_table([r.row() for r in records]))
        print(f"{args.command}: {len(records)} records, {len(failed)} failed parity")
    return code or (FAILED if failed else OK)


def _info(args: argparse.Namespace) -> int:
    devices = [find_device(args.device).type] if args.device else ["cpu", "cuda"]
    if not torch.cuda.is_available():
        devices = [d for d in devices if d != "cuda"]
    names = args.backend or list(BACKENDS)
    shown = {"device": "cpu" if devices == ["cpu"] else "cuda"}
    machine = fingerprint(shown["device"])
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
        "built": build_report(),
        "ops": {op: {d: choose(op, d, None) for d in devices} for op in CASES},
    }
    if args.gemm:
        found["gemm"] = {
            str(dtype).removeprefix("torch."): asdict(measure_plan(dtype))
            for dtype in dtypes_of(args, ("fp32", "bf16", "fp16"))
        }
    print(dump(found) if args.json else _info_text(found))
    return OK


def _instruction_sets() -> list[str]:
    """What torch finds in this processor."""
    probes = ("avx2", "avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    return [p for p in probes if getattr(torch.cpu, f"_is_{p}_supported", lambda: False)()]


def _info_text(found: dict[str, Any]) -> str:
    def line(key: str, value: Any) -> str:
        return f"{key:<18}{', '.join(value) if isinstance(value, list) else value}"

    facts = {k: v for k, v in found.items() if not isinstance(v, dict) and v is not None}
    lines = [line(key, value) for key, value in facts.items()]
    lines.append("\nbackends")
    for name, b in found["backends"].items():
        state = "available" if b["available"] else f"missing: {b['missing']}"
        lines.append(line(f"  {name}", f"{'/'.join(b['devices'])}, {state}"))
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
    return "\n".join(lines)


def _run(argv: list[str] | None) -> int:
    args = _build_parser().parse_args(argv)
    if args.command is None:
        return _main_job(args)
    for name in MAIN_ONLY:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise WrongInput(f"{option} belongs to the main job, not to {args.command}")
    return _info(args) if args.command == "info" else _op_job(args)


def main(argv: list[str] | None = None) -> int:
    """Run a command line (sys.argv's by default); returns its exit code."""
    try:
        code = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except WrongInput as error:
        note(f"error: {error}")
        return WRONG
    except (MemoryError, RuntimeError) as error:
        # On a CPU, torch's allocator raises a RuntimeError like any other.
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not short and "can't allocate memory" not in str(error):
            raise
        note(f"error: out of memory: {str(error).splitlines()[0] if str(error) else ''}")
        return WRONG
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
