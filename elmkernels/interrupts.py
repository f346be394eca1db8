"""How Ctrl-C and SIGTERM end the command line, from before torch is imported to its end.

Loading torch takes a second or more. A KeyboardInterrupt in the middle of that would be a page of
torch's own frames, so the package's `__init__` asks for `answer_at_start` first of all.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

INTERRUPTED, TERMINATED = 130, 143
PROGRAM = "elmkernels"
_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
# How Python leaves them if nobody asked for anything else: what is ignored stays ignored.
_UNASKED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_last = {"code": INTERRUPTED}


def answer_at_start() -> None:
    """If this process is the command: end it by one line and its exit code, until `raised` is
    entered. Nothing has begun then, so there is nothing to clean up.
    """
    if _is_the_command():
        _ask(_end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Meanwhile Ctrl-C and SIGTERM raise KeyboardInterrupt. Only the main thread may ask for
    signals.
    """
    _last.update(code=INTERRUPTED)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _ask(_raise, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code() -> int:
    """Of a command that a KeyboardInterrupt has ended: which signal raised it is told here, since
    a stream of tokens keeps the exception to itself.
    """
    return _last["code"]


def _ask(handler, *instead) -> dict:
    """Have the signals handled that nobody else handles, or one of `instead`; gives what did."""
    before = {}
    for number, unasked in _UNASKED.items():
        now = signal.getsignal(number)
        if now == unasked or now in instead:
            before[number] = signal.signal(number, handler)
    return before


def _raise(number: int, _: object) -> None:
    _last.update(code=_CODES[signal.Signals(number)])
    raise KeyboardInterrupt


def _end(number: int, _: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{PROGRAM}: interrupted\n".encode())
    os._exit(_CODES[signal.Signals(number)])


def _is_the_command() -> bool:
    """Whether this process is `elmkernels` or `python -m elmkernels`, not a program that imports
    the package, and no process that the command has started.
    """
    words, name = sys.orig_argv[1:], sys.argv[0] if getattr(sys, "argv", None) else ""
    if name == "-m":  # Python puts the file there once it has imported the package
        return ("-m", PROGRAM) in zip(words, words[1:], strict=False)
    return name in words and Path(name).stem == PROGRAM
