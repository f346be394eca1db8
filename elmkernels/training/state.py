"""Checkpoints of a run: OUT/checkpoints/step-00000100/, from which it goes on as if never stopped.

Model and optimizer lie in torch.distributed.checkpoint's form, by parameter name and whole shape,
so that one process, DDP and FSDP of any size read each other's. trainer.json holds the rest: step,
position in the data, recipe, model's configuration, random states, and every file's size.

A checkpoint is written under another name, synced and renamed when it is whole. It is examined
before anything is read from it, and refused as a whole.
"""

import base64
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from ..openelm.config import OpenELMConfig
from ..weights.storage import read_json, sync_folder, write_json
from .journal import NotSaved
from .parallel import World

FACTS = "trainer.json"
_FORM = 1
_NAME = re.compile(r"step-(\d{8,})")
# What of a recipe decides which tokens come in which order (train leaves out validation's files).
_ORDER = ("data", "seed")


class Broken(ValueError):
    """A checkpoint that is not as it was written."""


def path_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def found(out: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, oldest first, whole or not."""
    folder = out / "checkpoints"
    paths = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    matched = [(_NAME.fullmatch(path.name), path) for path in paths]
    return dict(sorted((int(match[1]), path) for match, path in matched if match))


def examine(path: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint that is whole. Raises Broken, saying what is wrong."""
    try:
        facts = read_json(path / FACTS)
    except (OSError, ValueError) as error:
        raise Broken(f"{path} is broken: {error}") from error
    if facts.get("form") != _FORM:
        raise Broken(f"{path / FACTS}: form must be {_FORM}, got {facts.get('form')!r}")
    missing = {"step", "position", "recipe", "config", "files", "random", "tokens"} - facts.keys()
    if missing:
        raise Broken(f"{path / FACTS} lacks {', '.join(sorted(missing))}")
    for name, size in facts["files"].items():
        file = path / name
        if not file.is_file():
            raise Broken(f"{path} is broken: {name} is missing")
        if file.stat().st_size != size:
            raise Broken(f"{path} is broken: {name} must have {size} bytes, "
                         f"got {file.stat().st_size}")  # fmt: skip
    return facts


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
                shutil.rmtree(left)
        partial.mkdir(parents=True)

    def finish() -> None:
        files = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
        write_json(partial / FACTS, {"form": _FORM, **facts, "files": files})
        sync_folder(partial)
        if target.exists():
            target.rename(target.with_name(f".{target.name}.old"))
        partial.rename(target)
        sync_folder(target.parent)

    try:
        world.together(begin)
        _write(partial, model, optimizer, world)
        world.together(finish)
    except (OSError, RuntimeError, CheckpointException) as error:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
        whole = newest_whole(out)
        rest = "none was before" if whole is None else f"that of step {whole} stays the newest"
        raise NotSaved(f"{target} can't be written: {_reason(error)}; {rest}") from error
    world.together(lambda: _rotate(out, keep))
    return target


def _write(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with _quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=world.size == 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of what one process asks for on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """The cause of a failed write in a line; torch wraps one of each process."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def _rotate(out: Path, keep: int) -> None:
    for path in list(found(out).values())[:-keep] if keep else []:
        dropped = path.with_name(f".{path.name}.old")
        path.rename(dropped)  # at once no checkpoint any more, however long the rest takes
        shutil.rmtree(dropped)


def restore(path: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Read a checkpoint that `examine` has passed into model and optimizer.

    The optimizer's settings stay those of the recipe. Raises Broken; the model is then no good.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=world.size == 1)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise Broken(f"{path} can't be read: {_reason(error)}") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter on the CPU, by name; of several processes with FSDP only the first has them.
    Called by every process.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def average(paths: list[Path], config: OpenELMConfig) -> dict[str, Tensor]:
    """The mean of the checkpoints' weights, added up in float64, one parameter at a time."""
    mean = {}
    for name, shape in config.parameter_shapes().items():
        total = torch.zeros(shape, dtype=torch.float64)
        for path in paths:
            part = {"model": {name: torch.empty(shape)}}
            with _quiet():
                dcp.load(part, storage_reader=dcp.FileSystemReader(path), no_dist=True)
            total += part["model"][name]
        mean[name] = (total / len(paths)).float()
    return mean


def random_states(device: torch.device) -> dict[str, str]:
    """torch's default generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {k: base64.b64encode(bytes(s.tolist())).decode() for k, s in states.items()}


def set_random_states(states: Mapping[str, str], device: torch.device) -> None:
    decoded = {
        k: torch.tensor([*base64.b64decode(s)], dtype=torch.uint8) for k, s in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)


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
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise NotSaved(f"{target} can't be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
