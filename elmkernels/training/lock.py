"""One run at a time in a folder: OUT/train.lock, which names the process that has it.

The system holds the lock and lets it go when the process ends, however it ends: what a killed run
leaves is a file that the next one takes over. Where the system or the file system has no such locks
(it isn't POSIX, or is mounted without), there are none here.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..weights.storage import told

FILE = "train.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Around a run in `out`, a folder. Raises ValueError, which names the process that has it, and
    OSError if the file can't be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = out / FILE
    while True:
        # No link is followed: what is written must be in this folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            which = holder if holder.isdigit() else "that is beginning"
            raise ValueError(f"out must be of no other run, {out} is of process {which}") from None
        except OSError as error:  # a file system without locks: there are none here either
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        # A run that has just ended may have removed the file that was opened here.
        if _is_still(path, descriptor):
            break
        os.close(descriptor)
    try:
        with told(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
