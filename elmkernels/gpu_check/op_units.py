"""Ops as units of a check under a clock: parity, memory errors, time beside baselines."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import torch

from ..backends import REFERENCE
from ..bench.ops import bench_op, passes
from ..devices import missing_backends
from ..testing.cases import CASES, bench_cases
from ..testing.cases.attention import long_tokens
from ..testing.cases.draw import Case
from ..testing.parity import DTYPES, Record, check_parity, plan
from .gpu_facts import datasheet, gpu_name
from .stages import Clock, Found, LeftOut, Unit, first_line

GOLDEN = 0.6180339887498949  # i * GOLDEN mod 1 visits any list evenly, however early one stops
MOST_ERRORS = 3
SANITIZER = "compute-sanitizer"
FOUND = 9  # the exit code that it is asked for if it finds an error
LONG_TOKENS = 0  # "rows" of a token of each of many sequences, long ones
BENCH_LIMIT = 150.0  # seconds after which one is taken to hang: baselines are compiled in it
LEAST_SECONDS = 30.0  # below which no watched process gets to its first case
# Whose parity comes first: what a GPU decodes with, and of it the cases by form and few rows.
FIRST = ("decode_step", "linear", "qk_norm_rope")
_FORMS = "(plain|affine8_64|affine4_64|packed12)"
FIRST_CASES = {"decode_step": rf"{_FORMS}_batch_[1-4]", "linear": rf"{_FORMS}_rows_[18]"}
NORMS = ("rms_norm", "add_rms_norm")
UNTIMED = ("decode_step",)  # generation, whose step it is, times it


class Bench(NamedTuple):
    """Rows of a layer of each model; ops: those measured, all if there are none. compiled: with
    torch.compile beside them, which takes its time.
    """

    rows: int
    dtype: torch.dtype = torch.bfloat16
    ops: tuple[str, ...] = ()
    models: tuple[str, ...] = ("1_1B",)
    compiled: bool = False


# The most telling first: a token, what moves far more than any cache holds, few rows.
BENCHES = (
    Bench(1, compiled=True),
    Bench(16384, ops=("rms_norm", "qk_norm_rope"), compiled=True),
    Bench(LONG_TOKENS, ops=("attention",)),
    Bench(4, ops=NORMS),
    Bench(16, ops=NORMS),
    Bench(8, ops=("linear",), models=("1_1B", "270M")),
    Bench(16384, ops=("rms_norm",), models=("270M", "450M", "3B")),
    Bench(16384, ops=("add_rms_norm",)),
    Bench(4096, compiled=True),
    Bench(512),
    Bench(64),
    Bench(8),
    Bench(4096, torch.float32),
    Bench(1, torch.float32),
    Bench(512, torch.float32),
)


def pairs(device: torch.device, quick: bool = False) -> list[tuple[str, str]]:
    """(op, backend) of all that runs on a device; quick: of each op the preferred one alone."""
    usable = {name for name, why in missing_backends(device).items() if why is None}
    found = [(op, b) for op, b in plan(None, None, device) if b in usable]
    first = {op: b for op, b in reversed(found)}
    return [(op, b) for op, b in found if not quick or first[op] == b]


def evenly(items: list) -> list:
    """The same items in an order of which any beginning is spread over all of them."""
    order = sorted(range(len(items)), key=lambda i: i * GOLDEN % 1)
    return [items[i] for i in order]


def parity_units(device: torch.device, quick: bool, first: bool) -> list[Unit]:
    """Each op on each backend: forward and backward, in every dtype. first: those in FIRST, or the
    others.
    """
    found = [(op, b) for op, b in pairs(device, quick) if (op in FIRST) == first]
    if first:
        found.sort(key=lambda pair: FIRST.index(pair[0]))
    return [Unit(f"{op} {b}", partial(_parity, op, b, device)) for op, b in found]


def in_order(op: str) -> list[Case]:
    """The op's cases: those that come first, then the others spread evenly."""
    pattern = FIRST_CASES.get(op, "(?!)")
    first = [c for c in CASES[op] if re.fullmatch(pattern, c.name)]
    return first + evenly([c for c in CASES[op] if c not in first])


def _parity(op: str, backend: str, device: torch.device, found: Found, clock: Clock) -> None:
    """As many cases as there is time for, one at least; a case that raises doesn't end it."""
    todo = [(c, d) for c in in_order(op) for d in DTYPES.values() if d in c.dtypes]
    dtypes: dict[str, dict] = {}
    found |= {"op": op, "backend": backend, "wanted": len(todo), "run": 0, "ok": False}
    found |= {"failed": [], "raised": {}, "dtypes": dtypes}
    for case, dtype in todo:
        if found["run"] and clock.left() <= 0:
            break
        found["run"] += 1
        try:
            _count(check_parity(op, case, dtype, backend, device), found)
        except Exception as error:  # compilers and drivers raise anything
            found["raised"][f"{case.name} {dtype}"] = first_line(error)
            if len(found["raised"]) >= MOST_ERRORS:
                break
    if found["raised"]:
        raise RuntimeError(f"{len(found['raised'])} of {found['run']} cases raised")
    found["ok"] = not found["failed"]


def _count(record: Record, found: Found) -> None:
    row = found["dtypes"].setdefault(record.dtype, {"run": 0, "failed": 0, "worst": 0.0})
    row["run"] += 1
    row["failed"] += not record.ok
    row["worst"] = max(row["worst"], record.worst.used)
    if not record.ok:
        found["failed"].append(record.row())


def sanitizer_units(device: torch.device, quick: bool) -> list[Unit]:
    """A few small cases of each op in a process of their own, watched if the tool is there."""
    ops = dict.fromkeys(op for op, _ in pairs(device))
    names = list(ops)[:1] if quick else list(ops)
    return [Unit("memcheck", partial(_memcheck, names, device))]


def _memcheck(names: list[str], device: torch.device, found: Found, clock: Clock) -> None:
    tool = shutil.which(SANITIZER) if device.type == "cuda" else None
    watch = [] if tool is None else [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND)]
    found["tool"] = tool or f"absent: {SANITIZER} is not on PATH, or this is no GPU"
    command = [
        *watch,
        sys.executable,
        "-m",
        "elmkernels.gpu_check.sanitizer_cases",
        "--device",
        str(device),
    ]
    command += ["--cases", "1" if device.type == "cpu" else "2", *names]
    limit = max(LEAST_SECONDS, clock.left())
    code, out, err = run_apart(command, limit)
    found |= {"code": code, "cases": out.splitlines()[-60:], "ok": code == 0}
    if watch and code not in (0, 1, FOUND):
        raise LeftOut(f"{SANITIZER} ended with {code}: {(err or out).strip()[-300:]}")
    if code:
        raise RuntimeError(f"exit code {code}: {(err or out)[-600:]}")


def run_apart(command: list[str], seconds: float) -> tuple[int, str, str]:
    """A command's exit code and what it printed. Raises LeftOut if it takes longer. Then, and
    if this process is interrupted, whatever it started is ended with it.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise LeftOut(f"not done after {seconds:.0f} s") from error
        raise
    return process.returncode, out, err


def bench_units(device: torch.device, quick: bool) -> list[Unit]:
    """Forward and forward + backward beside the baselines, the most telling rows first."""
    chosen = [p for p in pairs(device, quick) if p[1] != REFERENCE and p[0] not in UNTIMED]
    units: dict[str, Unit] = {}
    for bench in (Bench(1, models=("270M",)),) if quick else BENCHES:
        for op, backend in chosen:
            if bench.ops and op not in bench.ops:
                continue
            for case in _cases(op, bench):
                if bench.dtype not in case.dtypes:
                    continue
                for backward in passes(op):
                    name = str(bench.dtype).removeprefix("torch.")
                    what = f"{op}{' fwd+bwd' if backward else ''} {case.name} {name} {backend}"
                    run = partial(_bench, op, case, bench, backend, backward, device)
                    units.setdefault(what, Unit(what, run, BENCH_LIMIT))
    return list(units.values())


def _cases(op: str, bench: Bench) -> list[Case]:
    if bench.rows == LONG_TOKENS:
        return [long_tokens(model) for model in bench.models]
    return [case for model in bench.models for case in bench_cases(op, (bench.rows,), model)]


def _bench(op, case, bench, backend, backward, device, found: Found, clock: Clock):
    dtype, compiled = bench.dtype, bench.compiled
    options = {"min_time": 0.05, "rounds": 7} if device.type == "cuda" else {"min_time": 0.01}
    try:
        record = bench_op(op, case, dtype, backend, backward, device, compiled=compiled, **options)
    except RuntimeError as error:
        if not compiled:
            raise
        # A baseline that can be called may yet not be captured: ours is measured without it.
        record = bench_op(op, case, dtype, backend, backward, device, compiled=False, **options)
        record.missing["compiled"] = first_line(error)
    found |= record.json() | {"rows": bench.rows}
    promised = datasheet(gpu_name(device))
    found |= {"bandwidth": record.bandwidth, "of_copy": record.of_copy, "ok": record.parity}
    found["ratios"] = {name: record.speedup(name) for name in record.baselines}
    found["of_datasheet"] = None if promised is None else record.bandwidth / promised.bandwidth
    found["of_datasheet_flops"] = (
        None if promised is None or not record.flops or dtype == torch.float32
        else record.flops / record.time.median / promised.bf16
    )  # fmt: skip
