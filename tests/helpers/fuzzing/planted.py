"""Faults on purpose: what the watcher must see, one kind for each."""

import os
import pickle
import random
import subprocess
import time
from collections.abc import Callable

from .cases import Kind

NAMES = (
    "write", "remove", "rename", "follow", "unpickle", "spawn", "memory", "key", "recursion",
    "crash", "hang", "type",
)  # fmt: skip


class Planted(Kind):
    """Case n does the n-th of NAMES."""

    count = 0

    def make(self, rng: random.Random) -> Callable[[], str]:
        self.case.mkdir()
        name = NAMES[int(rng.seed_text.rpartition("-")[2])]  # the worker's own attribute
        return lambda: getattr(self, name)() or "loaded"

    def write(self) -> None:
        self.canary.write_text("x")

    def remove(self) -> None:
        self.canary.unlink(missing_ok=True)

    def rename(self) -> None:
        (self.case / "a").write_text("x")
        os.replace(self.case / "a", self.canary)

    def follow(self) -> None:
        (self.case / "link").symlink_to(self.canary)
        (self.case / "link").write_text("x")

    def unpickle(self) -> None:
        pickle.loads(pickle.dumps(os.getcwd))

    def spawn(self) -> None:
        subprocess.run(["true"])

    def memory(self) -> None:
        b"x" * (400 << 20)

    def key(self) -> None:
        raise KeyError("rename")

    def recursion(self) -> None:
        self.recursion()

    def crash(self) -> None:
        os.abort()

    def hang(self) -> None:
        time.sleep(60)

    def type(self) -> None:
        raise TypeError("argument of type 'int' is not iterable")
