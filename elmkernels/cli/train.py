"""`elmkernels train`: a recipe, carried out; under torchrun by several processes.

Exit codes: 0 the run reached its last step, 1 it failed (a loss that isn't finite, a full
disk), 2 wrong input, 130 ended by Ctrl-C and 143 by SIGTERM, saved in both
cases.
"""

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

from ..bench.machine import busy
from ..bench.timing import fingerprint
from ..interrupts import INTERRUPTED, TERMINATED
from ..openelm.config import VARIANTS
from .console import (
    FAILED,
    OK,
    REFUSALS,
    RESULTS,
    WRONG,
    Output,
    WrongInput,
    dump,
    note,
    words,
)
from .options import add_device, add_json, find_device, new_command, positive

NAME = "train"

# Known without the room, which imports torch.distributed.
READY = ("tiny", *VARIANTS)
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
_CODES = {None: OK, "SIGINT": INTERRUPTED, "SIGTERM": TERMINATED}


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(
        commands,
        NAME,
        run,
        "train a model as a recipe says",
        "Precision and backend are the recipe's: --set engine.precision=bf16, engine.kernels=avx2.",
    )
    parser.usage = f"{parser.prog} CONFIG [options]"
    add = parser.add_argument
    add(
        "recipe",
        metavar="CONFIG",
        help=f"a YAML file (ours or CoreNet's), or a ready one: {', '.join(READY)}",
    )
    add("--out", metavar="DIR", help="everything goes there (default: runs/NAME)")
    add("--resume", action="store_true", help="there must be a checkpoint in DIR to go on from")
    add("--fresh", action="store_true", help="begin anew; an earlier run's files are set aside")
    add(
        "--from-step", type=positive, metavar="N", help="go on from that checkpoint, not the newest"
    )
    add("--steps", type=positive, metavar="N", help="stop after N in all; the schedule stays")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="replace a field of the recipe, such as engine.precision=bf16",
    )
    add(
        "--compare",
        action="store_true",
        help="train eager and accelerated, and hold their curves against each other",
    )
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    if args.fresh and (args.resume or args.from_step):
        raise WrongInput("--fresh begins anew: it can't go with --resume or --from-step")
    device = find_device(args.device)
    # Late: the other commands needn't wait for torch.distributed.
    from ..training import parallel
    from ..training.journal import NotSaved
    from ..training.loop import Failed

    try:
        with parallel.world(device) as world:
            try:
                return _run(args, world)
            except parallel.Reported:
                return WRONG
            except (Failed, NotSaved) as error:
                if world.first:
                    note(f"error: {words(error)}")
                return FAILED
            except REFUSALS as error:
                if isinstance(error, RuntimeError):
                    raise
                who = "" if world.first else f"process {world.rank}: "
                raise WrongInput(f"{who}{words(error)}") from error
    except ValueError as error:  # of the device: there is no world yet
        raise WrongInput(str(error)) from error


def _run(args: argparse.Namespace, world: Any) -> int:
    from ..training.run import AUTO, FRESH, RESUME, Start, train

    def say(text: str) -> None:
        if world.first:
            note(text)

    recipe, notes = world.together(lambda: read(args.recipe, args.set))
    for line in notes:
        say(line)
    out = Path("runs") / Path(args.recipe).stem if args.out is None else Path(args.out)
    if args.compare:
        return _compare(args, recipe, out, world, say)
    how = FRESH if args.fresh else RESUME if args.resume or args.from_step else AUTO
    done = train(recipe, out, world, Start(how, args.from_step), args.steps, say)
    if world.first:
        print(dump(done) if args.json else _text(done))
        if done["stopped"]:
            where = f"saved in {done['checkpoint']}" if done["checkpoint"] else "nothing was saved"
            note(f"stopped by {done['stopped']} after step {done['steps']}; {where}")
    return _CODES[done["stopped"]]


def read(source: str, changes: list[str]) -> tuple[Any, list[str]]:
    """The recipe with the fields of --set replaced, and what is to be said about it."""
    from ..training.recipe import from_mapping, load, merge, to_mapping

    recipe, notes = load(source)
    values = to_mapping(recipe)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set must be SECTION.FIELD=VALUE, got {change!r}")
        *sections, field = name.strip().split(".")
        if sections == ["model"] and isinstance(values["model"], str):
            values["model"] = {"model_name": values["model"]}
        over: Any = {field: _value(text, change)}
        if sections == ["model"]:  # which `merge` replaces as a whole
            over = values["model"] | over
        for section in reversed(sections):
            over = {section: over}
        values = merge(values, over)
    try:
        return (from_mapping(values) if changes else recipe), notes
    except (ValueError, TypeError) as error:
        raise type(error)(f"--set: {error}") from error


def _value(text: str, change: str) -> Any:
    """What YAML makes of a value."""
    from ..weights.texts import parse_yaml

    if _EXPONENT.fullmatch(text.strip()):  # without a point it is a word to YAML 1.1
        return float(text)
    try:
        return parse_yaml(text, "it")
    except ValueError as error:
        raise ValueError(f"--set {change}: the value must be YAML") from error


def _text(done: dict[str, Any]) -> str:
    """The summary as lines."""
    lines = [f"step {done['steps']} of {done['of']}, {done['tokens']:,} tokens"]
    if done["loss"] is not None:
        lines.append(f"loss        {done['loss']:.4f}")
    if done["evaluation"]:
        found = done["evaluation"]
        text = f"{found['loss']:.4f} (perplexity {found['perplexity']:.2f}, "
        lines.append(f"evaluation  {text}{found['sequences']} sequences)")
    if done["tokens_per_second"]:
        lines.append(f"tokens/s    {done['tokens_per_second']:,.0f}")
    if done["skipped"]:
        lines.append(f"left out    {done['skipped']} updates that weren't finite")
    for name in ("log", "checkpoint", "final", "average"):
        if done[name]:
            lines.append(f"{name:<12}{done[name]}")
    return "\n".join(lines)


def _compare(args: argparse.Namespace, recipe: Any, out: Path, world: Any, say: Any) -> int:
    from ..training import compare

    if world.size > 1:
        raise WrongInput("--compare runs in one process")
    if args.resume or args.from_step or args.fresh:
        raise WrongInput("--compare always begins anew, without --resume, --from-step or --fresh")
    steps = min(args.steps or recipe.schedule.steps, recipe.schedule.steps)
    output = Output(str(out), args.command, charts=True)
    results = {"command": args.command, "machine": fingerprint(world.device), "busy": busy()}
    if results["busy"]:
        say(results["busy"])
    save = partial(output.keep, RESULTS, lambda: output.save(results))
    compare.compare(recipe, world, steps, results, say, save)
    draw = partial(compare.draw, results)
    output.keep("charts", lambda: output.draw(lambda folder: draw(folder / "chart.png")))
    print(dump(results) if args.json else compare.text(results))
    output.tell()
    return OK if all(found["ok"] for found in results["precisions"].values()) else FAILED
