"""Long loops, counted on a terminal."""

import sys
from collections.abc import Iterable, Iterator


def progress(items: Iterable[str], what: str) -> Iterator[str]:
    """The items, with a bar (a count without tqdm) on stderr where that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield from items
        return
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"\r{what}: {i}/{len(items)}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
    else:
        yield from tqdm(items, desc=what, leave=False)
