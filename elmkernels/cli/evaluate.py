"""elmkernels eval: a checkpoint on lm-eval's tasks, beside what Apple published for it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..bench.table import format_table, markdown
from ..bench.timing import fingerprint
from ..evaluation import harness, suites
from ..evaluation.store import Store, checkpoint_fingerprint
from ..openelm.model import OpenELM
from ..openelm.tokenizer import FILES, Tokenizer, find_tokenizer, special_tokens
from .console import OK, Output, Progress, WrongInput, checked, measure, note
from .options import (
    DTYPES,
    accelerated,
    add_backend,
    add_checkpoint,
    add_config,
    add_device,
    add_dtype,
    add_json,
    add_out,
    check_backend,
    chosen_model,
    find_device,
    new_command,
    positive,
)

NAME = "eval"
_LINES = 20  # at most, for the units of a kind of request, where stderr is no terminal


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands, NAME, run, "a checkpoint on lm-eval's tasks, beside Apple's figures",
        f"Needs lm-eval: {harness.INSTALL}",
    )  # fmt: skip
    add_checkpoint(parser, required=True)
    add_config(parser)
    add = parser.add_argument
    add(
        "--suite",
        metavar="NAME|TASK,...",
        required=True,
        help=f"{', '.join(suites.names())}, or tasks of lm-eval",
    )
    add("--examples", type=int, metavar="N", help="before a question (a suite has its own)")
    add("--task-folder", metavar="DIR", help="YAML files with tasks of your own")
    add("--limit", type=positive, metavar="N", help="questions of each task (default: all)")
    add("--tokenizer", metavar="PATH", help=f"{' or '.join(FILES)} (default: by the checkpoint)")
    add_device(parser)
    add_dtype(parser, None, "cast the weights: fp32, bf16 or fp16 (default: as they are)")
    kernels = parser.add_mutually_exclusive_group()
    add_backend(kernels)
    kernels.add_argument("--eager", action="store_true", help="the reference, without kernels")
    add_out(parser, "results, a table, and all scores to go on from")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    if args.examples is not None and args.examples < 0:
        raise WrongInput(f"--examples must be at least 0, got {args.examples}")
    suite, chosen = checked(suites.find, args.suite, args.examples)
    device = find_device(args.device)
    check_backend(args.backend, device)
    name, weights, load = chosen_model(args, device, 0)
    tokenizer = _tokenizer(args)
    checked(harness.check_installed)
    tasks = _tasks(args, chosen)
    model = checked(load, None if args.dtype is None else DTYPES[args.dtype]).eval()
    if not args.eager:
        accelerated(model, args.backend)
    output = Output(args.out, args.command)
    about = {
        "checkpoint": checkpoint_fingerprint(Path(args.checkpoint)),
        "dtype": str(model.activation_dtype).removeprefix("torch."),
        "device": str(device.type),
        "kernels": "none" if args.eager else args.backend or "best",
    }
    published = suites.published_model(model.config, name)
    results = {
        "elmkernels": __version__, "command": args.command, "model": name, "weights": weights,
        **about, "suite": args.suite, "limit": args.limit, "published_model": published,
        "source": suites.source(), "machine": fingerprint(device), "complete": False,
    }  # fmt: skip
    shown = _Shown()

    def work() -> None:
        lm = _lm(model, tokenizer, Store(output.folder, [__version__, about]), shown)
        found = checked(
            lambda: harness.run(
                lm, chosen, tasks, suite=suite, published=published, limit=args.limit
            )
        )
        results.update(found, complete=True)

    try:
        code = measure(args, output, None, results, work)
    finally:
        shown.close()
    if results["complete"]:
        rows = _table(results)
        output.keep("summary.md", lambda: output.write("summary.md", markdown(rows) + "\n"))
        if not args.json:
            print(format_table(rows))
    elif output.folder is not None:
        note("the same command goes on from there")
    output.tell()
    return code or OK


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    path = checked(find_tokenizer, args.tokenizer, args.checkpoint)
    if path is None:
        raise WrongInput(
            f"evaluating needs a tokenizer: --tokenizer PATH, or {' or '.join(FILES)} beside the "
            "checkpoint (OpenELM uses Llama 2's, which meta-llama/Llama-2-7b-hf holds)"
        )
    bos, _ = checked(special_tokens, args.checkpoint)
    return checked(Tokenizer, path, bos)


def _tasks(args: argparse.Namespace, chosen: list[suites.Chosen]) -> dict[str, Any]:
    """The tasks with their data, one at a time: that may mean to fetch it, for minutes."""
    progress = Progress(len(chosen), lines=False)
    try:
        return checked(
            lambda: harness.load_tasks(
                chosen, args.task_folder, lambda task: progress(f"data of {task}")
            )
        )
    finally:
        progress.close()


def _lm(model: OpenELM, tokenizer: Tokenizer, store: Store, shown: "_Shown") -> Any:
    from ..evaluation.lm import OpenELMLM

    return OpenELMLM(model, tokenizer, store=store, progress=shown)


class _Shown:
    """How far each kind of request is, one after another."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def __call__(self, units: int) -> Callable[[str], None]:
        self.close()
        progress = self.progress = Progress(units, lines=False)
        every = -(-units // _LINES) or 1

        def step(task: str) -> None:
            progress.lines = progress.count % every == 0
            progress(task)

        return step

    def close(self) -> None:
        """Take the line away."""
        if self.progress is not None:
            self.progress.close()
        self.progress = None


def _table(results: dict[str, Any]) -> list[dict[str, Any]]:
    published = results["published_model"]
    rows = [
        {
            "task": row["label"],
            "examples": row["examples"],
            "metric": row["metric"],
            "questions": row["questions"],
            "here": _number(row["value"]),
            "error": _number(row["error"]),
            f"{published}": _number(row["published"]),
            "difference": _number(row["difference"], sign=True),
        }
        for row in results["tasks"]
    ]
    if results["average"] is not None:
        rows.append(
            {
                "task": suites.AVERAGE,
                "here": _number(results["average"]),
                f"{published}": _number(results["published_average"]),
                "difference": _number(results["average_difference"], sign=True),
            }
        )
    return rows


def _number(value: float | None, sign: bool = False) -> str | None:
    if value is None:
        return None
    if abs(value) >= 1e5:
        return f"{value:.3e}"
    return f"{value:+.2f}" if sign else f"{value:.2f}"
