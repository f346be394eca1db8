"""From plain values to a recipe's dataclasses and back: types, names, ranges."""

import types
from collections.abc import Iterable, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any, Union, get_args, get_origin, get_type_hints

from .. import checks


def known(section: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError for a field that doesn't exist, with the nearest that does."""
    names = list(names)
    for name in values:
        if name not in names:
            near = get_close_matches(str(name), names, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
            what = f"section {section} has" if section else "a recipe has"
            raise ValueError(f"{what} no field {name}: {hint}")


def build(kind: type, values: Any, section: str = "") -> Any:
    """The dataclass `kind` from a mapping; sections that are None or left out have defaults."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        expected = "a mapping of fields"
        checks.fail(section or "a recipe", expected, _shown(values), TypeError)
    hints = get_type_hints(kind)
    known(section, values, hints)
    made = {}
    for name, value in values.items():
        full = f"{section}.{name}" if section else name
        if is_dataclass(hints[name]):
            made[name] = build(hints[name], value, full)
        else:
            made[name] = _convert(full, value, hints[name])
    return kind(**made)


def plain(value: Any) -> Any:
    """Dataclasses and tuples as mappings and lists, all the way down."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclass_fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


_NO = object()


def _convert(name: str, value: Any, hint: Any) -> Any:
    found = _as(value, hint)
    if found is _NO:
        checks.fail(name, _spoken(hint), _shown(value), TypeError)
    return found


def _as(value: Any, hint: Any) -> Any:
    """The value as the hint wants it, or _NO."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next((v for v in (_as(value, arg) for arg in args) if v is not _NO), _NO)
    if hint is type(None):
        return None if value is None else _NO
    if origin is tuple:
        return _as_tuple(value, args)
    if origin is not None:  # Mapping[str, Any]
        is_mapping = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return dict(value) if is_mapping else _NO
    if hint is float:
        return _as_float(value)
    return value if type(value) is hint else _NO


def _as_tuple(value: Any, args: tuple) -> Any:
    if isinstance(value, str) and args[0] is str:
        value = [value]  # one path needs no list
    if not isinstance(value, list | tuple):
        return _NO
    if args[-1] is not ... and len(args) != len(value):
        return _NO
    items = tuple(_as(item, args[0]) for item in value)
    return _NO if _NO in items else items


_MOST = 2**63  # of an integer in a recipe


def _as_float(value: Any) -> Any:
    if isinstance(value, str):
        # YAML 1.1 reads 3e-4, which has no point, as a string.
        try:
            return float(value)
        except ValueError:
            return _NO
    if type(value) is int and abs(value) < _MOST:  # YAML's integers have no end
        return float(value)
    return value if type(value) is float else _NO


_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _spoken(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_spoken, args))
    if origin is tuple:
        item = {str: "strings", int: "integers", float: "numbers"}[args[0]]
        return f"a list of {item}" if args[-1] is ... else f"a list of {len(args)} {item}"
    if hint is type(None):
        return "null"
    return _WORDS.get(hint, "a mapping")


# section.field: the least value that it may have.
_AT_LEAST = {
    "seed": 0,
    "data.min_characters": 0,
    "data.min_tokens": 0,
    "data.sequence_length": 1,
    "batch.sequences": 1,
    "batch.micro": 1,
    "optimizer.weight_decay": 0,
    "optimizer.grad_clip": 0,
    "schedule.steps": 1,
    "schedule.min_lr": 0,
    "schedule.max_lr": 0,
    "schedule.warmup_init_lr": 0,
    "schedule.warmup_steps": 0,
    "loss.z_loss": 0,
    "keep.checkpoint_every": 0,
    "keep.checkpoints": 0,
    "keep.average": 0,
    "keep.log_every": 0,
    "keep.evaluate_every": 0,
    "keep.evaluate_sequences": 1,
}
_ONE_OF = {
    "on_nan": ("stop", "skip"),
    "engine.precision": ("bf16", "fp32"),
    "engine.parallel": ("ddp", "fsdp"),
}


def validate(recipe: Any) -> None:
    """Ranges, and fields that must go together, whatever the model."""
    for name, least in _AT_LEAST.items():
        value = _get(recipe, name)
        if not (value >= least and (value < _MOST if type(value) is int else isfinite(value))):
            checks.fail(name, f"{least} or more" + " (below 2^63)" * (value >= _MOST), value)
    for name, allowed in _ONE_OF.items():
        value = _get(recipe, name)
        if value not in allowed:
            checks.fail(name, " or ".join(allowed), repr(value))
    for beta in recipe.optimizer.betas:
        if not 0 <= beta < 1:
            checks.fail("optimizer.betas", "two numbers in [0, 1)", list(recipe.optimizer.betas))
    if not (recipe.optimizer.eps > 0 and isfinite(recipe.optimizer.eps)):
        checks.fail("optimizer.eps", "positive", recipe.optimizer.eps)
    if not 0 <= recipe.loss.label_smoothing < 1:
        checks.fail("loss.label_smoothing", "in [0, 1)", recipe.loss.label_smoothing)
    if recipe.data.eos is not None and recipe.data.eos < 0:
        checks.fail("data.eos", "0 or more", recipe.data.eos)
    schedule, batch = recipe.schedule, recipe.batch
    if schedule.steps < schedule.warmup_steps:
        expected = f"at least schedule.warmup_steps {schedule.warmup_steps}"
        checks.fail("schedule.steps", expected, schedule.steps)
    if schedule.max_lr < schedule.min_lr:
        checks.fail("schedule.max_lr", f"at least min_lr {schedule.min_lr}", schedule.max_lr)
    if batch.sequences % batch.micro:
        checks.fail("batch.sequences", f"a multiple of batch.micro {batch.micro}", batch.sequences)


def _get(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe
