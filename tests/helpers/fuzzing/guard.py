"""What a reader of files must not do: write outside of its folder, run what it reads, take memory
that the files don't have.

Python tells of such deeds before they are done (its audit events), torch's and safetensors' own
code aside, which writes no files here.
"""

import os
import sys
from pathlib import Path
from typing import Any

# More of a process than the largest case needs, its buffers included.
MEMORY = 200 << 20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that change files, and which of their arguments are paths.
_CHANGES = {
    "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (1,),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,),
    "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip
_RUNS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect",
)  # fmt: skip


def _peak() -> int:
    """KiB that this program has held at most; ru_maxrss begins with those of what started it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


class Guard:
    """Notes faults while it is watching. roots: the folders that may be written to."""

    def __init__(self, *roots: Path) -> None:
        self.roots = tuple(map(os.path.realpath, roots))
        self.faults: list[str] = []
        self.watching = False
        self._peak = 0
        sys.addaudithook(self._see)

    def begin(self) -> None:
        self.faults, self.watching = [], True
        self._peak = _peak()

    def end(self) -> list[str]:
        self.watching = False
        grown = (_peak() - self._peak) << 10
        if grown > MEMORY:
            self.faults.append(f"took {grown >> 20} MiB more than any case before")
        return self.faults

    def _see(self, event: str, args: tuple) -> None:
        if not self.watching:
            return
        if event in _RUNS and not (event == "marshal.loads" and _importing()):
            self.faults.append(f"ran {event}{args!r}"[:300])
        elif event == "open":
            path, mode, flags = args
            writes = bool(flags & _WRITING) if isinstance(flags, int) else "r" not in str(mode)
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._inside(event, path, follow=True)
        elif event in _CHANGES:
            for index in _CHANGES[event]:
                if isinstance(args[index], str | bytes | os.PathLike):
                    self._inside(event, args[index], follow=event in ("os.truncate", "os.chmod"))

    def _inside(self, event: str, path: Any, follow: bool) -> None:
        text = os.fsdecode(path)
        folder, name = os.path.split(os.path.abspath(text))
        real = os.path.realpath(text) if follow else os.path.join(os.path.realpath(folder), name)
        allowed = any(real == root or real.startswith(root + os.sep) for root in self.roots)
        if not allowed and real != os.devnull:
            self.faults.append(f"{event} outside: {real}")


def _importing() -> bool:
    """Whether Python is reading a module that something imports late."""
    frame = sys._getframe()
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
