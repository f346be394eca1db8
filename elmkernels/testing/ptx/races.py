"""Races: accesses of one byte by different threads, one of them a store, and no barrier between.

Of each unit of memory the last writer and the last readers are known, with the number of barriers
that their block, and of synchronizations that their warp, had passed. An access is after another if
it is the same thread's, or if since then the block passed a barrier, or the warp, if both are in
one, was synchronized. Threads of different blocks of one launch are never in order. A store that
changes nothing races with nothing.
"""

from typing import NamedTuple

import numpy as np

from .faults import Fault
from .floats import Array

_THREAD, _EPOCH = 24, 18  # bits; 2 remain for how many readers there are
_ALONE, _WARP, _MANY = 0, 1, 2


class Clock(NamedTuple):
    """Who accesses: threads of the grid, barriers of their blocks and syncs of their warps."""

    thread: Array
    block: Array
    warp: Array


def thread_name(thread: int, threads: int) -> str:
    """A thread of the grid, by its number in its block of so many threads."""
    return f"thread {thread % threads} of block {thread // threads}"


class Shadow:
    """What is known of `units` units of memory.

    Args:
        units: how many; an access of n bytes touches n / unit of them.
        threads: in a block.
    """

    def __init__(self, units: int, threads: int):
        self.threads = threads
        self.writers = np.full(units, -1, np.int64)
        self.readers = np.full(units, -1, np.int64)

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
        return (before >= 0) & ~ordered

    def read(self, units: Array, clock: Clock) -> None:
        """Loads, each of one unit."""
        bad = self._clash(self.writers[units], clock)
        if bad.any():
            self._raise("reads what", self.writers[units], bad, clock)
        before, now = self.readers[units], self._pack(clock)
        thread = before & ((1 << _THREAD) - 1)
        block = (before >> _THREAD) & ((1 << _EPOCH) - 1)
        old = (before >> (_THREAD + 2 * _EPOCH)) & 3
        here = (before >= 0) & (
            (block == clock.block) | (thread // self.threads != clock.thread // self.threads)
        )
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
        for before, what in ((self.writers, "writes what"), (self.readers, "overwrites what")):
            bad = self._clash(before[units], clock) & changed
            if bad.any():
                reader = "read" if before is self.readers else "written"
                self._raise(what, before[units], bad, clock, reader)
        self.writers[units] = self._pack(clock)

    def _raise(
        self, what: str, before: Array, bad: Array, clock: Clock, verb: str = "written"
    ) -> None:
        other = int((before[bad] & ((1 << _THREAD) - 1))[0])
        own = int(clock.thread[bad][0])
        names = [thread_name(t, self.threads) for t in (own, other)]
        raise Fault("race", f"{names[0]} {what} {names[1]} has {verb} since their last barrier")
