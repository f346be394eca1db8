"""Memory that is checked at every access: inside what is there, aligned, written before it is read.

A space is one array of bytes with as large an array of marks. Between what is there lie guards:
bytes without the mark THERE, poisoned, which nothing may touch.
"""

from typing import NamedTuple

import numpy as np

from .faults import Fault
from .floats import Array

THERE, WRITTEN, TRACKED = 1, 2, 4
GUARD = 512
POISON = 0xFB
# Generic addresses: each space has a window.
GLOBAL, SHARED, LOCAL, PARAM = 0x7F0000000000, 1 << 40, 2 << 40, 3 << 40
WINDOW = 1 << 40


def apart(space: str, address: Array) -> list[Array] | None:
    """Which addresses are in one space, if they are generic and in several."""
    if space or address.size < 2:
        return None
    windows = address >> WINDOW.bit_length() - 1
    if (windows == windows[0]).all():
        return None
    inner = np.where(windows <= 3, windows, 0)  # those of shared, local, parameters
    numbers = np.unique(inner)
    return None if numbers.size == 1 else [np.flatnonzero(inner == n) for n in numbers]


class Region(NamedTuple):
    """A named stretch of a space."""

    name: str
    begin: int
    size: int


class Space:
    """Bytes with their marks.

    Args:
        size: in bytes; made a multiple of 16.
        name: what errors call it.
    """

    def __init__(self, size: int, name: str):
        size = -(-size // 16) * 16
        self.name = name
        self.bytes = np.full(size, POISON, np.uint8)
        self.marks = np.zeros(size, np.uint8)
        self.regions: list[Region] = []
        self._views: dict[tuple[str, int], Array] = {}

    def add(self, region: Region, marks: int | Array = THERE) -> None:
        """Put a region there."""
        self.regions.append(region)
        self.marks[region.begin : region.begin + region.size] = marks

    def _view(self, what: str, size: int) -> Array:
        key = (what, size)
        if key not in self._views:
            array = self.bytes if what == "bytes" else self.marks
            self._views[key] = array.view(f"u{size}")
        return self._views[key]

    def check(self, at: Array, size: int, written: bool) -> tuple[bool, bool]:
        """Offsets of accesses of `size` bytes; returns whether any byte is tracked, and all are."""
        if (at >= self.marks.size - size + 1).any() or (at < 0).any():
            self._outside(at, size)
        if (at & (size - 1)).any():
            bad = int(at[(at & (size - 1)) != 0][0])
            raise Fault("alignment", f"{size} bytes at {self.where(bad)}")
        unit = min(size, 8)
        view, first = self._view("marks", unit), at // unit
        some, every, tracked = False, True, _each(TRACKED, unit)
        for i in range(size // unit):
            marks = view[first + i]
            need = _each(THERE | (WRITTEN if written else 0), unit)
            if ((marks & need) != need).any():
                self._explain(at, size)
            some = some or bool((marks & tracked).any())
            every = every and bool(((marks & tracked) == tracked).all())
        return some, every

    def _outside(self, at: Array, size: int) -> None:
        bad = int(at[(at >= self.marks.size - size + 1) | (at < 0)][0])
        raise Fault("bounds", f"{size} bytes at {self.where(bad)}")

    def region(self, at: int) -> int:
        """The number of the region that a byte is in."""
        return next(i for i, r in enumerate(self.regions) if r.begin <= at < r.begin + r.size)

    def _explain(self, at: Array, size: int) -> None:
        marks = self.marks[at[:, None] + np.arange(size)]
        missing = (marks & THERE) == 0
        if missing.any():
            bad = int(at[missing.any(1)][0])
            raise Fault("bounds", f"{size} bytes at {self.where(bad)}")
        bad = int(at[((marks & WRITTEN) == 0).any(1)][0])
        raise Fault("uninitialized", f"{size} bytes at {self.where(bad)} that nothing has written")

    def where(self, at: int) -> str:
        """An offset, by the nearest region."""
        if not self.regions:
            return f"byte {at} of {self.name}, which is empty"

        def distance(r: Region) -> int:
            return max(r.begin - at, at - (r.begin + r.size - 1), 0)

        near = min(self.regions, key=distance)
        return f"byte {at - near.begin} of {near.name}, which has {near.size}"

    def load(self, at: Array, size: int, count: int) -> list[Array]:
        """`count` neighbours of `size` bytes each, as unsigned integers."""
        view, first = self._view("bytes", size), at // size
        return [view[first + i] for i in range(count)]

    def store(self, at: Array, values: list[Array], size: int) -> None:
        """The reverse. Marks them as written."""
        view, first = self._view("bytes", size), at // size
        marks = self._view("marks", size)
        for i, value in enumerate(values):
            view[first + i] = value
            marks[first + i] |= _each(WRITTEN, size)

    def mark(self, at: Array, size: int, mark: int, on: bool = True) -> None:
        """Set or clear a mark of accesses of `size` bytes."""
        unit = min(size, 8)
        view, first = self._view("marks", unit), at // unit
        for i in range(size // unit):
            if on:
                view[first + i] |= _each(mark, unit)
            else:
                view[first + i] &= ~_each(mark, unit)


def _each(mark: int, size: int) -> np.unsignedinteger:
    """A mark in each byte of an integer of `size` bytes."""
    return np.dtype(f"u{size}").type(int.from_bytes(bytes([mark]) * size, "little"))


class Tensors(Space):
    """Global memory: each tensor's storage between guards, at an address that is congruent to its
    own modulo 256.

    Args:
        storages: (name, address, bytes, marks) of each; the bytes are copied, and those that were
            stored are in `self.bytes` afterwards.
    """

    def __init__(self, storages: list[tuple[str, int, Array, Array]]):
        begins, end = [], GUARD
        for _, address, data, _ in storages:
            begin = -(-end // 256) * 256 + address % 256
            begins.append(begin)
            end = begin + data.size + GUARD
        super().__init__(end, "global memory")
        for (name, _, data, marks), begin in zip(storages, begins, strict=True):
            self.bytes[begin : begin + data.size] = data
            self.add(Region(name, begin, data.size), marks)
        self._begins = begins
        self.changes = 0  # stores and atomics so far

    def address(self, storage: int, offset: int) -> int:
        """What a kernel is given for the byte at `offset` of a storage."""
        return GLOBAL + self._begins[storage] + offset

    def offset(self, address: Array) -> Array:
        """Where addresses are in this space."""
        return address - GLOBAL

    def data(self, storage: int) -> tuple[Array, Array]:
        """The bytes and the marks of a storage."""
        region = self.regions[storage]
        cut = slice(region.begin, region.begin + region.size)
        return self.bytes[cut], self.marks[cut]


class Storages(Tensors):
    """Global memory at the addresses that it has: pointers within it are left as they are.

    Args:
        storages: as `Tensors` takes them; they don't overlap.
    """

    def __init__(self, storages: list[tuple[str, int, Array, Array]]):
        storages = sorted(storages, key=lambda s: s[1])
        super().__init__(storages)
        self._own = np.array([s[1] for s in storages], np.int64)
        self._places = np.array(self._begins, np.int64)
        self._sizes = np.array([s[2].size for s in storages], np.int64)

    def address(self, storage: int, offset: int) -> int:
        """The address itself."""
        return int(self._own[storage]) + offset

    def offset(self, address: Array) -> Array:
        """Where addresses are; those of nothing are in the guard of what is before them, as much
        aligned as they are."""
        near = np.maximum(np.searchsorted(self._own, address, "right") - 1, 0)
        inner, size = address - self._own[near], self._sizes[near]
        over, under = inner >= size, inner < 0
        inner = np.where(over & (inner >= size + 256), size + (inner - size) % 256, inner)
        inner = np.where(under, inner % 256 - 256, inner)
        return self._places[near] + inner
