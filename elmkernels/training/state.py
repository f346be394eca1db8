"""Checkpoints of a run: OUT/checkpoints/step-00000100/, from which it goes on as if never stopped.

Model and optimizer lie in safetensors files, by parameter name (see `parts`), so that one process,
DDP and FSDP of any size read each other's. trainer.json holds the rest: step, position in the data,
recipe, model's configuration, random states, size and SHA-256 of every file, and its own.

A checkpoint is written under another name, synced and renamed when it is whole. It is examined to
the last byte before anything is read from it, and refused as a whole. Reading one runs nothing that
it says: it may be anybody's.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from ..acceleration.routines import Plan
from ..openelm.config import OpenELMConfig
from ..weights.storage import sync_folder, write_json
from ..weights.texts import read_json
from . import parts
from .journal import NotSaved
from .parallel import World
from .routines import ALLOWED

FACTS = "trainer.json"
_FORM = 2
_DIGEST = "sha256"  # of the facts themselves, among the facts
_NAME = re.compile(r"step-([0-9]{8,15})")
# What of a recipe decides which tokens come in which order (train leaves out validation's files).
_ORDER = ("data", "seed")


class Broken(ValueError):
    """A checkpoint that is not as it was written."""


def path_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def found(out: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, oldest first, whole or not."""
    folder = out / "checkpoints"
    if folder.is_symlink():  # what is old in there is deleted
        raise ValueError(f"{folder} must be a folder of {out}, got a link")
    paths = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    matched = [(_NAME.fullmatch(path.name), path) for path in paths]
    return dict(sorted((int(match[1]), path) for match, path in matched if match))


def examine(path: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint that is whole, every value of the type that it must be. Raises
    Broken, saying what is wrong.
    """
    try:
        if not (path / FACTS).is_file():
            raise Broken(f"{path} is broken: {FACTS} is missing")
        facts = read_json(path / FACTS)
        _check_facts(path, facts)
        for name, (size, digest) in facts["files"].items():
            file = path / name
            if not file.is_file():
                raise Broken(f"{path} is broken: {name} is missing")
            if file.stat().st_size != size:
                raise Broken(f"{path} is broken: {name} must have {size} bytes, "
                             f"got {file.stat().st_size}")  # fmt: skip
            if parts.digest(file) != digest:
                raise Broken(f"{path} is broken: {name} must have the SHA-256 {digest}, another "
                             "was found")  # fmt: skip
    except Broken:
        raise
    except (OSError, ValueError) as error:
        raise Broken(f"{path} is broken: {error}") from error
    return facts


def _check_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise Broken for facts of another form, or that no save has written so."""
    file = path / FACTS
    if facts.get("form") == 1:
        raise Broken(
            f"{file}: form must be {_FORM}, got 1: an earlier version's checkpoint, which holds "
            "pickled code and is not read"
        )
    if facts.get("form") != _FORM:
        raise Broken(f"{file}: form must be {_FORM}, got {facts.get('form')!r}")
    if missing := _KINDS.keys() - facts.keys():
        raise Broken(f"{file} lacks {', '.join(sorted(missing))}")
    for name, is_right in _KINDS.items():
        if not is_right(facts[name]):
            raise Broken(f"{file}: {name} must be as a save writes it, got {_short(facts[name])}")
    if facts[_DIGEST] != _digest_of(facts):
        raise Broken(f"{file} is broken: its values must have the SHA-256 that it names")
    if path.name != path_of(Path(), facts["step"]).name:
        raise Broken(f"{file}: step must be that of the folder's name, got {facts['step']}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest_of(facts: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in facts.items() if k != _DIGEST}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _files(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(
        parts.NAME.fullmatch(name)
        and isinstance(found, list)
        and len(found) == 2
        and _count(found[0])
        and _hexadecimal(found[1])
        for name, found in value.items()
    )  # fmt: skip


def _plan(value: Any) -> bool:
    """One that could have been measured: each routine for rows that it takes."""
    kinds = {name: type(default) for name, default in asdict(Plan()).items()}
    if value is None:
        return True
    # Of a checkpoint from before several rows had a routine of their own, they have the default.
    if not isinstance(value, dict) or value.keys() | {"several_rows"} != kinds.keys():
        return False
    return all(
        type(found) is kinds[name] and (kinds[name] is not str or found in ALLOWED[name])
        for name, found in value.items()
    )


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


# What each value must be before anything is done with it; the rest of a recipe and a configuration
# is compared, not used.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "step": _count,
    "position": _count,
    "tokens": _count,
    "skipped": _count,
    "recipe": lambda value: isinstance(value, dict),
    "config": lambda value: isinstance(value, dict),
    "plan": _plan,
    "random": lambda value: _texts(value) and "cpu" in value,
    "files": _files,
    _DIGEST: _hexadecimal,
}


def newest_whole(out: Path) -> int | None:
    """The step of the newest checkpoint that can be read."""
    for step, path in reversed(found(out).items()):
        try:
            examine(path)
        except Broken:
            continue
        return step
    return None


def choose(out: Path, step: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its facts: of a step, or the newest; None without any.

    Raises Broken, naming the newest that is whole, and FileNotFoundError for a step that isn't
    there.
    """
    paths = found(out)
    if step is not None and step not in paths:
        have = f"steps {', '.join(map(str, paths))}" if paths else "none"
        raise FileNotFoundError(f"{path_of(out, step)} does not exist, there are {have}")
    if not paths:
        return None
    path = paths[max(paths) if step is None else step]
    try:
        return path, examine(path)
    except Broken as error:
        whole = newest_whole(out)
        advice = "there is no other: --fresh begins anew"
        if whole is not None:
            advice = f"the newest whole one is of step {whole}: --from-step {whole} goes on from it"
        raise Broken(f"{error}; {advice}") from error


def check_config(path: Path, facts: Mapping[str, Any], config: OpenELMConfig) -> None:
    """Raises ValueError for a checkpoint of another model, with both values of each field."""
    saved, now = facts["config"], plain_config(config)
    different = [
        f"{name} must be {now.get(name)}, got {saved.get(name)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(f"{path} is of another model: {'; '.join(different)}")


def plain_config(config: OpenELMConfig) -> dict[str, Any]:
    """What makes the model, as JSON has it."""
    values = {k: v for k, v in asdict(config).items() if k not in ("model_name", "qkv_multipliers")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def recipe_changes(facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[list[str], bool]:
    """How a recipe differs from the checkpoint's, a line a field; and whether the data's order
    does, which a run can't change half-way.
    """
    was, now = _flat(facts["recipe"]), _flat(recipe)
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    # The model's own fields are compared where they count, in its configuration.
    names = [name for name in names if name.split(".")[0] not in ("model", "initial")]
    lines = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]
    return lines, any(name.split(".")[0] in _ORDER for name in names)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def save(
    out: Path,
    facts: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    keep: int,
) -> Path:
    """Write the checkpoint of facts["step"]; called by every process. keep: how many stay, 0 all.

    Raises NotSaved in the first process, `Reported` in the others.
    """
    target = path_of(out, facts["step"])
    partial = target.with_name(f".{target.name}.partial")

    def begin() -> None:
        if target.parent.is_dir():
            for left in target.parent.glob(".step-*"):
                _remove(left)
        partial.mkdir(parents=True)

    def write() -> None:
        parts.write(partial, parts.tensors_of(model, optimizer), world.rank)

    def finish() -> None:
        files = {f.name: [f.stat().st_size, parts.digest(f)] for f in sorted(partial.iterdir())}
        whole = {"form": _FORM, **facts, "files": files}
        write_json(partial / FACTS, {**whole, _DIGEST: _digest_of(whole)})
        sync_folder(partial)
        if target.exists():
            target.rename(target.with_name(f".{target.name}.old"))
        partial.rename(target)
        sync_folder(target.parent)

    try:
        world.together(begin)
        world.each(write)
        world.together(finish)
    except (OSError, RuntimeError) as error:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
        whole = newest_whole(out)
        rest = "none was before" if whole is None else f"that of step {whole} stays the newest"
        raise NotSaved(f"{target} can't be written: {_reason(error)}; {rest}") from error
    world.together(lambda: _rotate(out, keep))
    return target


def _reason(error: BaseException) -> str:
    """The cause of a failed write in a line."""
    text = str(error) if isinstance(error, OSError) else str(error).split("\n")[0]
    return " ".join(text.split()) or type(error).__name__


def _remove(path: Path) -> None:
    """A folder with all that is in it, or whatever else is there under its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rotate(out: Path, keep: int) -> None:
    for path in list(found(out).values())[:-keep] if keep else []:
        dropped = path.with_name(f".{path.name}.old")
        path.rename(dropped)  # at once no checkpoint any more, however long the rest takes
        _remove(dropped)


def restore(path: Path, facts: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Read a checkpoint that `examine` has passed into model and optimizer; by every process.

    The optimizer's settings stay those of the recipe. Raises Broken; the model is then no good.
    """
    try:
        parts.load(parts.Parts(path, [*facts["files"]]), model, optimizer)
    except (OSError, RuntimeError, ValueError) as error:
        raise Broken(f"{path} can't be read: {_reason(error)}") from error


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter on the CPU, by name; of several processes with FSDP only the first has them.
    Called by every process.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def average(
    checkpoints: Mapping[Path, Mapping[str, Any]], config: OpenELMConfig
) -> dict[str, Tensor]:
    """The mean of the weights of checkpoints ({path: its facts}), added up in float64, one
    parameter at a time.
    """
    opened = [parts.Parts(path, [*facts["files"]]) for path, facts in checkpoints.items()]
    shapes = config.parameter_shapes()
    return {name: parts.mean(opened, name, shape) for name, shape in shapes.items()}


def random_states(device: torch.device) -> dict[str, str]:
    """torch's default generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {k: base64.b64encode(bytes(s.tolist())).decode() for k, s in states.items()}


def set_random_states(states: Mapping[str, str], device: torch.device) -> None:
    """Raises Broken for a text that is no state."""
    setters: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state}
    if device.type == "cuda":
        setters["cuda"] = lambda state: torch.cuda.set_rng_state(state, device)
    for name, put in setters.items():
        if name in states:
            try:
                state = base64.b64decode(states[name], validate=True)
                put(torch.tensor([*state], dtype=torch.uint8))
            except (ValueError, RuntimeError, TypeError) as error:
                raise Broken(f"random: {name} must be a generator's state: {error}") from error


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__, "os": os.name}


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Make target the folder that `write(folder)` fills, in place of the one that is there.

    Raises NotSaved; the one that is there then stays.
    """
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    try:
        for left in (partial, old):
            if left.exists() or left.is_symlink():
                _remove(left)
        partial.mkdir(parents=True)
        write(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise NotSaved(f"{target} can't be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
