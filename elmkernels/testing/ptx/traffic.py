"""What a kernel moves: bytes that threads ask for, sectors of 32 bytes that their warps touch,
sectors of memory that are touched at all, conflicts of the banks of shared memory, instructions
by class.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .floats import Array

SECTOR, BANKS = 32, 32
_NONE = np.zeros(0, np.int64)


@dataclass
class Traffic:
    """Counts of a launch.

    Attributes:
        asked: bytes that threads load from and store to global memory.
        sectors: that the accesses of warps touch, each access by itself.
        touched: sectors of memory that were loaded, and that were stored, by their numbers.
        times: how often each sector was loaded, and stored.
        shared: accesses of shared memory by warps, and the cycles that these take.
        issued: instructions of warps by class.
    """

    asked: Counter = field(default_factory=Counter)
    sectors: Counter = field(default_factory=Counter)
    touched: dict[str, set[int]] = field(default_factory=lambda: {"load": set(), "store": set()})
    times: dict[str, Array] = field(default_factory=lambda: {"load": _NONE, "store": _NONE})
    shared: Counter = field(default_factory=Counter)
    issued: Counter = field(default_factory=Counter)

    def access(self, kind: str, at: Array, size: int, warps: Array) -> None:
        """`size` bytes of global memory at each offset, by threads of these warps."""
        self.asked[kind] += at.size * size
        first = at // SECTOR
        keys = [warps.astype(np.int64) << 40 | first]
        if size > SECTOR:
            keys.append(keys[0] + 1)
        unique = np.unique(np.concatenate(keys))
        self.sectors[kind] += unique.size
        numbers = unique & ((1 << 40) - 1)
        self.touched[kind].update(np.unique(numbers).tolist())
        now = np.bincount(numbers, minlength=self.times[kind].size)
        now[: self.times[kind].size] += self.times[kind]
        self.times[kind] = now

    def bank(self, kind: str, at: Array, size: int, lanes: Array) -> None:
        """`size` bytes of shared memory: words of 4 bytes in 32 banks. Wider accesses take a warp
        in halves or quarters; of one word all threads are served at once."""
        parts = max(1, size // 4)
        part = (lanes // 32) * parts + (lanes % 32) * parts // 32
        words = (at[:, None] // 4 + np.arange(parts)).ravel()
        keys = np.unique(np.repeat(part, parts).astype(np.int64) << 32 | words)
        banks = (keys >> 32) * BANKS + (keys & 0xFFFFFFFF) % BANKS
        numbers, counts = np.unique(banks, return_counts=True)
        worst = np.zeros(int(numbers.max()) // BANKS + 1, np.int64)
        np.maximum.at(worst, numbers // BANKS, counts)
        self.shared[f"{kind} accesses"] += int((worst > 0).sum())
        self.shared[f"{kind} cycles"] += int(worst.sum())
