"""Work on a matrix's rows in pieces that fit a core's cache, by as many threads as torch uses."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_CHUNK = 1 << 18  # weights at a time


def each_chunk(fn: Callable[[slice], T], rows: int, columns: int) -> list[T]:
    """fn of successive slices of a matrix's rows, by as many threads as torch uses.

    Each thread stays within its core's cache, and waits for no other as it would in every
    operation that torch divides: on a busy machine that takes many times as long.
    """
    size = max(1, _CHUNK // max(1, columns))
    slices = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(fn, slices))
