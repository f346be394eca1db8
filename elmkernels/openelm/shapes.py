"""The numbers that a configuration is made of: each as Python's own, or refused by its name."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..checks import fail, integer, is_integer

LAYERS = "num_transformer_layers"
_DEEPEST = 16384  # layers: each is described before there is a weight
_WIDEST = 2**40  # of any size: no machine holds more, and products of two are exact
_FLOAT32 = np.finfo(np.float32)  # what statistics and angles are computed in
_LEAST, _MOST = float(_FLOAT32.tiny), float(_FLOAT32.max)


def size(name: str, value: Any) -> int:
    """A positive integer that something could have as its size."""
    found = integer(name, value, 1)
    most, words = (_DEEPEST, f"{_DEEPEST}") if name == LAYERS else (_WIDEST, "2^40")
    if found > most:
        fail(name, f"at most {words}", found)
    return found


def number(name: str, value: Any) -> int | float:
    """A positive number that float32 holds."""
    if not _is_number(value) or not value > 0:
        fail(name, "a positive number", repr(value))
    if not _LEAST <= value <= _MOST:
        fail(name, f"in float32's range, {_LEAST:.3g} to {_MOST:.3g}", value)
    return plain(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        fail(name, "true or false", repr(value), TypeError)
    return bool(value)


def plain(value: Any) -> int | float:
    """A number as Python's own, an integer as one."""
    return int(value) if is_integer(value) else float(value)


def _is_number(value: Any) -> bool:
    """A bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, never under 0.9 of it and never 0."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def expand_multipliers(
    name: str, multipliers: float | Sequence[float], layers: int
) -> tuple[float, ...]:
    """One multiplier a layer, from a number, a (first, last) pair or the expanded list.

    With two layers a pair and a list are the same thing, up to the pair's rounding to two
    decimals, so two numbers are always read as a pair.
    """
    several = isinstance(multipliers, Sequence) and not isinstance(multipliers, str)
    for m in multipliers if several else (multipliers,):
        if _is_number(m) and not m > 0:
            fail(name, "positive", repr(multipliers))
        if _is_number(m) and not m < _WIDEST:
            fail(name, "less than 2^40", repr(multipliers))
    if _is_number(multipliers):
        expanded = (float(multipliers),) * layers
    elif not several:
        raise TypeError(f"{name} must be a number or a list of numbers, got {multipliers!r}")
    elif not all(map(_is_number, multipliers)):
        raise TypeError(f"{name} must hold numbers, got {multipliers!r}")
    elif len(multipliers) == 2:
        # numpy's rounding scales by 100 and back; Python's own differs in the last digit of ties.
        expanded = tuple(np.round(np.linspace(*multipliers, layers, dtype=float), 2).tolist())
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
