"""The numbers that a configuration is made of: each as Python's own, or refused by its name."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np

from ..checks import fail, integer, is_integer

LARGEST = 2**31 - 1  # of any size: what kernels count rows and columns in
LAYERS = "num_transformer_layers"
_DEEPEST = 10_000  # layers: each costs Python objects before its weights
_LEAST, _MOST = 1e-30, 1e30  # of eps and the rotary base: well inside of float32


def size(name: str, value: Any) -> int:
    """A positive integer that something could have as its size."""
    found = integer(name, value, 1)
    most = _DEEPEST if name == LAYERS else LARGEST
    if found > most:
        # It may have thousands of digits.
        got = found if found <= LARGEST else f"an integer of {found.bit_length()} bits"
        fail(name, f"at most {most}", got)
    return found


def number(name: str, value: Any) -> int | float:
    """A positive number well inside of what float32 holds."""
    if not _is_number(value) or not value > 0:
        fail(name, "a positive number", repr(value))
    if not _LEAST <= value <= _MOST:
        fail(name, f"a positive number, {_LEAST:g} to {_MOST:g}", value)
    return plain(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        fail(name, "true or false", repr(value), TypeError)
    return bool(value)


def plain(value: Any) -> int | float:
    """A number as Python's own, an integer as one."""
    return int(value) if is_integer(value) else float(value)


def _is_number(value: Any) -> TypeGuard[float]:
    """A bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, never under 0.9 of it and never 0."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _check_multipliers(name: str, each: Sequence[Any], given: Any) -> None:
    for m in each:
        if _is_number(m) and not m > 0:
            fail(name, "positive", repr(given))
        if _is_number(m) and not m <= LARGEST:
            fail(name, f"at most {LARGEST}", repr(given))


def expand_multipliers(
    name: str, multipliers: float | Sequence[float], layers: int
) -> tuple[float, ...]:
    """One multiplier a layer, from a number, a (first, last) pair or the expanded list.

    With two layers a pair and a list are the same thing, up to the pair's rounding to two
    decimals, so two numbers are always read as a pair.
    """
    if isinstance(multipliers, str) or not isinstance(multipliers, Sequence):
        if not _is_number(multipliers):
            raise TypeError(f"{name} must be a number or a list of numbers, got {multipliers!r}")
        _check_multipliers(name, [multipliers], multipliers)
        return (float(multipliers),) * layers
    _check_multipliers(name, multipliers, multipliers)
    if not all(map(_is_number, multipliers)):
        raise TypeError(f"{name} must hold finite numbers, got {multipliers!r}")
    if len(multipliers) == 2:
        # numpy's rounding scales by 100 and back; Python's own differs in the last digit of ties.
        first, last = multipliers
        expanded = tuple(np.round(np.linspace(first, last, layers, dtype=float), 2).tolist())
    elif len(multipliers) == layers:
        expanded = tuple(float(m) for m in multipliers)
    else:
        raise ValueError(
            f"{name} must be a number, a pair or a list of {layers} (num_transformer_layers), "
            f"got a list of {len(multipliers)}"
        )
    if not all(m > 0 for m in expanded):
        raise ValueError(f"{name} must be positive in every layer, got {multipliers!r}")
    return expanded


def layer_counts(name: str, counts: Any, layers: int) -> tuple[int, ...]:
    if isinstance(counts, str) or not isinstance(counts, Sequence):
        raise TypeError(f"{name} must be a list of {layers} integers, got {counts!r}")
    if len(counts) != layers:
        raise ValueError(
            f"{name} must have {layers} entries (num_transformer_layers), got {len(counts)}"
        )
    return tuple(size(f"{name}[{layer}]", count) for layer, count in enumerate(counts))
