"""A baseline in a process of its own: what kills it ends a row of a table, never the run.

`Apart("package.module:Class", *arguments)` makes the object there; `call` calls its methods. Both
sides are ours, so arguments and results are pickled.
"""

import signal
import subprocess
import sys
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any

# The other process sees the modules that this one does.
_START = "import sys; sys.path[:] = {path!r}; from {here} import serve; serve({descriptor})"


class Died(RuntimeError):
    """A baseline's process has ended while it was asked; the message says of what."""


class Apart:
    """An object in a process of its own, which lives as long as this one.

    Raises Died if the process ends, and RuntimeError with the message of what the object raises.
    """

    def __init__(self, factory: str, *arguments: Any) -> None:
        self._connection, theirs = Pipe()
        start = _START.format(path=sys.path, here=__name__, descriptor=theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a library may print what would be taken for results
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            self._ask((factory, arguments))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of object.method(*arguments)."""
        return self._ask((method, arguments))

    def _ask(self, request: tuple[str, tuple[Any, ...]]) -> Any:
        try:
            self._connection.send(request)
            failed, result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._connection.close()
            raise Died(f"died: {ending(self._process.wait())}") from error
        except BaseException:  # interrupted: the answer would be taken for that of the next request
            self.close()
            raise
        if failed:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        """End the process. What it does just now is not waited for."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def ending(code: int) -> str:
    """What ended a process, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"signal {-code}"
    return f"signal {number.name} ({signal.strsignal(number)})"


def serve(descriptor: int) -> None:
    """The other process: make an object, then call what is asked for, until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    connection = Connection(descriptor)
    made: Any = None
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if made is None:
                module, _, kind = name.partition(":")
                made, result = getattr(import_module(module), kind)(*arguments), None
            else:
                result = getattr(made, name)(*arguments)
            connection.send((False, result))
        except Exception as error:
            connection.send((True, f"{error}" or type(error).__name__))
