"""Numbers that kernels follow as indices: read to the last one, once, and again if they change.

A kernel takes the escapes of a packed12 weight and the offsets of an arena for right. To read them
at every call would cost more than the call, so what passed is remembered: the very tensors, where
they lie, and how often they were written. Of a tensor made in inference mode torch keeps no such
count: it is taken to stay what it was.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..checks import boundaries, fail, values_of, within


class _Passed(NamedTuple):
    tensors: tuple[ReferenceType[Tensor], ...]
    state: tuple
    facts: Hashable


# By the identity of the first tensor, which the weak reference confirms and, dying, removes.
_PASSED: dict[int, _Passed] = {}


def _writes(x: Tensor) -> int:
    """How often a tensor was written in place; -1 if torch doesn't know."""
    return -1 if x.is_inference() else x._version


def _without_numbers(x: Tensor) -> bool:
    return x.is_meta or (type(x) is not Tensor and is_fake(x))


def _state(tensors: tuple[Tensor, ...]) -> tuple:
    return tuple((x.data_ptr(), x.numel(), _writes(x)) for x in tensors)


def read_once(
    tensors: tuple[Tensor, ...], read: Callable[[], None], facts: Hashable = None
) -> None:
    """Call read(), which raises if the numbers in `tensors` are wrong, unless it passed before for
    these tensors, with the same `facts`, and they are what they were.
    """
    if torch.compiler.is_compiling() or any(map(_without_numbers, tensors)):
        return
    tensors = tuple(map(values_of, tensors))
    key, state = id(tensors[0]), _state(tensors)
    known = _PASSED.get(key)
    if (
        known is not None
        and known.state == state
        and known.facts == facts
        and all(r() is x for r, x in zip(known.tensors, tensors, strict=True))
    ):
        return
    read()
    forget = ref(tensors[0], lambda _: _PASSED.pop(key, None))
    _PASSED[key] = _Passed((forget, *map(ref, tensors[1:])), state, facts)


def check_escapes(name: str, starts: Tensor, columns: Tensor, k: int) -> None:
    """Raise ValueError unless the escapes of a packed12 weight of k columns are the rows' own, one
    after the other, each row's in ascending columns: kernels write where they point.
    """
    if starts.is_meta:
        return
    starts, columns = values_of(starts), values_of(columns)
    boundaries(f"{name}.escape_starts", starts, columns.numel())
    within(f"{name}.escape_columns", columns, k, "the weight's columns")
    rises = columns[1:] > columns[:-1]
    first = starts[1:-1].long()  # of each row but the first
    rises[first[(first > 0) & (first < len(columns))] - 1] = True
    if not bool(rises.all()):
        at = int(rises.int().argmin())
        row = int(torch.searchsorted(starts, at, right=True)) - 1
        got = f"{int(columns[at])} before {int(columns[at + 1])} in row {row}"
        fail(f"{name}.escape_columns", "ascending within each row", got)


def check_shares(name: str, offsets: Tensor, sizes: Sequence[int], elements: int) -> None:
    """Raise ValueError unless the two shares of each layer i, of sizes[i] elements from offsets
    int64 [layers, 2] on, lie within `elements` and apart from each other.
    """
    spans = sorted(
        (start, start + size, f"{name}[{i}, {which}]")
        for i, (starts, size) in enumerate(zip(offsets.tolist(), sizes, strict=True))
        for which, start in enumerate(starts)
    )
    end, before = 0, ""
    for start, stop, which in spans:
        if start < 0 or stop > elements:
            expected = f"so that {stop - start} elements from there on are among {elements}"
            fail(which, expected, start)
        if start < end:
            fail(which, f"at least {end}, the end of {before}'s share", start)
        end, before = stop, which


def check_runs(sequences: Tensor, positions: Tensor, batch: int) -> None:
    """Raise ValueError unless the tokens of each of `batch` sequences, which are told by both int64
    [n], are neighbours at ascending positions without a gap. Reads the data, like `within`.
    """
    if torch.compiler.is_compiling() or any(map(_without_numbers, (sequences, positions))):
        return
    within("sequences", sequences, batch, "the arena's sequences")
    rows, places = values_of(sequences).tolist(), values_of(positions).tolist()
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        if i == 0 or row != rows[i - 1]:
            if row in rows[:i]:
                fail("sequences", "of neighbours, all tokens of one together", rows)
        elif place != places[i - 1] + 1:
            expected = f"{places[i - 1] + 1} behind {places[i - 1]} of sequence {row}"
            fail(f"positions[{i}]", expected, place)
