"""Races: accesses of one byte by different threads, one of them a store, and no barrier between.

Of each unit of memory the last writer and the last readers are known, with the number of barriers
that their block, and of synchronizations that their warp, had passed. An access is after another if
it is the same thread's, or if since then the block passed a barrier, or the warp, if both are in
one, was synchronized. A store that changes nothing races with nothing.

Blocks of a launch are in order only by fences, and by atomics and strong accesses of what they
share. Of each thread it is known up to which barrier of each other block all is before it. A
release tells a place what is before the thread: all of its block up to the last barrier, and what
the thread knows of other blocks; who acquires from the place knows that too, and its block after
the next barrier. Relaxed accesses tell what a fence before them covered, and let know after a fence
behind them: what a thread of the block stored since its own last fence isn't covered. What a thread
did since its last barrier is never told.
"""

from typing import NamedTuple

import numpy as np

from .faults import Fault, PtxError
from .floats import Array

_THREAD, _EPOCH = 24, 18  # bits; 2 remain for how many readers there are
_ALONE, _WARP, _MANY = 0, 1, 2
_NEVER = 1 << 40
MOST = 1 << 26  # numbers that are kept of how blocks are in order


class Clock(NamedTuple):
    """Who accesses: threads of the grid, barriers of their blocks and syncs of their warps."""

    thread: Array
    block: Array
    warp: Array


def thread_name(thread: int, threads: int) -> str:
    """A thread of the grid, by its number in its block of so many threads."""
    return f"thread {thread % threads} of block {thread // threads}"


class Order:
    """What each thread of a grid knows of each block.

    Args:
        blocks: of the grid.
        threads: in a block.

    Raises:
        PtxError: there are too many of both.
    """

    def __init__(self, blocks: int, threads: int):
        if blocks * blocks * threads > MOST:
            raise PtxError(f"{blocks} blocks of {threads} threads that order each other")
        self.threads = threads
        shape = (blocks * threads, blocks)
        self.known = np.zeros(shape, np.int64)
        self.seen = np.zeros(shape, np.int64)  # by relaxed loads: a fence makes it known
        self.fenced = np.zeros(shape, np.int64)  # known at the last fence
        self.stored = np.full(shape[0], _NEVER)  # the first store since the last fence
        self.told: dict[int, Array] = {}

    def _of_block(self, array: Array, block: int) -> Array:
        return array[block * self.threads : (block + 1) * self.threads]

    def barrier(self, threads: Array) -> None:
        """Whole blocks have passed a barrier."""
        for block in np.unique(threads // self.threads):
            for array in (self.known, self.seen):
                part = self._of_block(array, block)
                part[:] = part.max(0)

    def fence(self, threads: Array, epochs: Array) -> None:
        """A fence for the whole GPU, after so many barriers."""
        self.known[threads] = np.maximum(self.known[threads], self.seen[threads])
        self.fenced[threads] = self.known[threads]
        self.fenced[threads, threads // self.threads] = epochs + 1  # by 1: 0 is no fence at all
        self.stored[threads] = _NEVER

    def store(self, threads: Array, epochs: Array) -> None:
        """A store to global memory."""
        self.stored[threads] = np.minimum(self.stored[threads], epochs)

    def release(self, at: int, thread: int, epoch: int, suffixes: tuple[str, ...]) -> None:
        """A thread stores in a place, or changes it, after so many barriers of its block."""
        block = thread // self.threads
        if "release" in suffixes or "acq_rel" in suffixes:
            clock = self.known[thread].copy()
            clock[block] = epoch
        else:
            clock = self.fenced[thread].copy()
            covered = int(self._of_block(self.stored, block).min())
            clock[block] = min(epoch, covered) if clock[block] else 0
        before = self.told.get(at)
        self.told[at] = clock if before is None else np.maximum(before, clock)

    def acquire(self, at: int, thread: int, suffixes: tuple[str, ...]) -> None:
        """A thread loads from a place."""
        clock = self.told.get(at)
        if clock is not None:
            strong = "acquire" in suffixes or "acq_rel" in suffixes
            array = self.known if strong else self.seen
            array[thread] = np.maximum(array[thread], clock)

    def before(self, thread: Array, other: Array, epoch: Array) -> Array:
        """Whether what threads `other` did after so many barriers is before what these do."""
        return self.known[thread, other // self.threads] > epoch


class Shadow:
    """What is known of `units` units of memory.

    Args:
        units: how many; an access of n bytes touches n / unit of them.
        threads: in a block.
        order: of the blocks, if anything can order them.
    """

    def __init__(self, units: int, threads: int, order: Order | None = None):
        self.threads, self.order = threads, order
        self.writers = np.full(units, -1, np.int64)
        self.readers = np.full(units, -1, np.int64)
        # The last readers of another block than those: one of both is not the writer's.
        self.others = np.full(units, -1, np.int64) if order is not None else None

    def _pack(self, clock: Clock) -> Array:
        block = clock.block.astype(np.int64) << _THREAD
        warp = clock.warp.astype(np.int64) << (_THREAD + _EPOCH)
        return clock.thread.astype(np.int64) | block | warp

    def _clash(self, before: Array, clock: Clock) -> Array:
        """Where accesses that came before are not in order with these."""
        thread = before & ((1 << _THREAD) - 1)
        block = (before >> _THREAD) & ((1 << _EPOCH) - 1)
        warp = (before >> (_THREAD + _EPOCH)) & ((1 << _EPOCH) - 1)
        readers = (before >> (_THREAD + 2 * _EPOCH)) & 3
        here = thread // self.threads == clock.thread // self.threads
        same_warp = (thread // 32 == clock.thread // 32) & (readers != _MANY)
        same = (thread == clock.thread) & (readers == _ALONE)
        ordered = same | (here & (block < clock.block)) | (same_warp & (warp < clock.warp))
        clash = (before >= 0) & ~ordered
        if self.order is not None and (clash & ~here).any():
            other = np.flatnonzero(clash & ~here)
            clash[other] = ~self.order.before(clock.thread[other], thread[other], block[other])
        return clash

    def constant(self, units: Array, clock: Clock) -> None:
        """Loads on the way for what nobody stores in this launch."""
        bad = self.writers[units] >= 0
        if bad.any():
            what = "reads, as what never changes, what"
            self._raise(what, self.writers[units], bad, clock, end=" in this launch")

    def read(self, units: Array, clock: Clock) -> None:
        """Loads, each of one unit."""
        bad = self._clash(self.writers[units], clock)
        if bad.any():
            self._raise("reads what", self.writers[units], bad, clock)
        before, now = self.readers[units], self._pack(clock)
        thread = before & ((1 << _THREAD) - 1)
        block = (before >> _THREAD) & ((1 << _EPOCH) - 1)
        old = (before >> (_THREAD + 2 * _EPOCH)) & 3
        apart = thread // self.threads != clock.thread // self.threads
        here = (before >= 0) & (apart | (block == clock.block))
        if self.others is not None:
            self.others[units[here & apart]] = before[here & apart]
            here = here & ~apart
        kind = np.where(thread // 32 == clock.thread // 32, _WARP, _MANY)
        kind = np.where(thread == clock.thread, _ALONE, kind)
        many = np.where(here, np.maximum(old, kind), _ALONE)
        self.readers[units] = now | many << (_THREAD + 2 * _EPOCH)
        # Threads that read the same unit at once: the last one stands there, for all of them.
        last = self.readers[units] & ((1 << _THREAD) - 1)
        both = last != clock.thread
        if both.any():
            kind = np.where(last // 32 == clock.thread // 32, _WARP, _MANY)[both]
            for level in (_WARP, _MANY):
                chosen = units[both][kind == level]
                self.readers[chosen] = np.maximum(
                    self.readers[chosen],
                    (self.readers[chosen] & ((1 << (_THREAD + 2 * _EPOCH)) - 1))
                    | level << (_THREAD + 2 * _EPOCH),
                )

    def write(self, units: Array, clock: Clock, changed: Array) -> None:
        """Stores, each of one unit, of which some change it."""
        for before, what in (
            (self.writers, "writes what"), (self.readers, "overwrites what"),
            (self.others, "overwrites what"),
        ):  # fmt: skip
            if before is None:
                continue
            bad = self._clash(before[units], clock) & changed
            if bad.any():
                verb = "written" if before is self.writers else "read"
                self._raise(what, before[units], bad, clock, verb)
        self.writers[units] = self._pack(clock)

    def _raise(
        self,
        what: str,
        before: Array,
        bad: Array,
        clock: Clock,
        verb: str = "written",
        end: str = " since their last barrier",
    ) -> None:
        other = int((before[bad] & ((1 << _THREAD) - 1))[0])
        own = int(clock.thread[bad][0])
        names = [thread_name(t, self.threads) for t in (own, other)]
        raise Fault("race", f"{names[0]} {what} {names[1]} has {verb}{end}")
