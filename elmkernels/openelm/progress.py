"""Long loops, counted on a terminal."""

import sys
import time
from collections.abc import Iterable, Iterator


def seconds_left(seconds: float, done: int, total: int) -> float | None:
    """About how long the rest will take, as what is done took `seconds`; None before that."""
    return seconds / done * max(0, total - done) if done else None


def elapsed_and_left(seconds: float, left: float | None) -> str:
    """How long it took so far, and about how long the rest will take if that is known."""
    return _clock(seconds) + ("" if left is None else f", about {_clock(left)} left")


def _clock(seconds: float) -> str:
    """0:05, 12:00 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(items: Iterable[str], what: str) -> Iterator[str]:
    """The items, with a bar (a count without tqdm) on stderr where that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield from items
        return
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        start = time.monotonic()
        for i, item in enumerate(items):
            seconds = time.monotonic() - start
            spent = elapsed_and_left(seconds, seconds_left(seconds, i, len(items)))
            count = f"{what}: {i + 1}/{len(items)} ({spent})"
            print(f"\r\x1b[K{count}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
    else:
        yield from tqdm(items, desc=what, leave=False)
