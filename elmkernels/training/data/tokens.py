"""Token files: raw little-endian ids, memory-mapped, with a small JSON file beside them.

`name.bin` holds the ids one after the other, uint16 or uint32, every document closed by the id
`eos`. `name.json` says {dtype, vocab_size, eos, documents, tokens, fingerprint}. A .bin that comes
alone is taken for uint16 with the tokenizer's eos, which is how such files are commonly passed on.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ... import checks
from ...weights.texts import read_json

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
# Ids of a file that are held against the vocabulary when it is opened: enough to see a wrong
# dtype or tokenizer at once. All others are when they are read.
_PEEK = 1 << 20


def dtype_for(vocab_size: int) -> str:
    """The narrowest dtype that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def sidecar(path: Path) -> Path:
    """The JSON file that belongs to a .bin."""
    return path.with_suffix(".json")


@dataclass(frozen=True)
class Info:
    """What a token file's JSON says."""

    dtype: str
    vocab_size: int
    eos: int
    documents: int
    tokens: int
    fingerprint: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")


def read_info(path: Path) -> Info | None:
    """The JSON beside a .bin, None where there is none. Raises ValueError where it is damaged."""
    file = sidecar(path)
    return Info(**_info_fields(file, read_json(file))) if file.is_file() else None


def _info_fields(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    wanted = Info.__annotations__
    if lacking := sorted(set(wanted) - set(values)):
        raise ValueError(f"{file} lacks {', '.join(lacking)}")
    for name, kind in wanted.items():
        if type(values[name]) is not kind:
            checks.fail(f"{file}: {name}", f"of type {kind.__name__}", repr(values[name]))
    if values["dtype"] not in DTYPES:
        checks.fail(f"{file}: dtype", " or ".join(DTYPES), repr(values["dtype"]))
    for name in ("vocab_size", "eos", "documents", "tokens"):
        if not 0 <= values[name] < 1 << 62:
            checks.fail(f"{file}: {name}", "a count, or an id", values[name])
    return {name: values[name] for name in wanted}


@dataclass(frozen=True)
class Part:
    """One token file, memory-mapped."""

    path: Path
    ids: np.ndarray
    documents: int | None  # None: nobody counted

    def check(self, ids: np.ndarray, vocab_size: int, start: int = 0) -> None:
        """Raises ValueError where one of these ids, which begin at `start`, is no token."""
        if ids.size and int(ids.max()) >= vocab_size:
            at = int(np.argmax(ids >= vocab_size))
            raise ValueError(
                f"{self.path}: ids must lie in [0, {vocab_size}) (the vocabulary), "
                f"got {int(ids[at])} at position {start + at}"
            )


def open_part(path: str | Path, vocab_size: int, eos: int | None) -> Part:
    """Memory-map one .bin whose ids must belong to a vocabulary, and end documents with `eos`
    (None: whatever the file says).

    Raises FileNotFoundError, and ValueError for a file that is cut short, holds other ids or
    contradicts its JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    info, size = read_info(path), path.stat().st_size
    dtype = DTYPES[info.dtype if info else "uint16"]
    if size % dtype.itemsize:
        checks.fail(f"{path}: its size", f"a multiple of {dtype.itemsize} ({dtype.name} ids)", size)
    count = size // dtype.itemsize
    if info is not None and count != info.tokens:
        checks.fail(f"{path}: its length", f"{info.tokens} tokens ({sidecar(path)})", count)
    if info is not None and eos is not None and info.eos != eos:
        checks.fail(f"{sidecar(path)}: eos", f"the tokenizer's {eos}", info.eos)
    # An empty file can't be mapped.
    ids = np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)
    part = Part(path, ids, info.documents if info else None)
    part.check(ids[:_PEEK], vocab_size)
    return part


class Tokens:
    """The tokens of one or more files as one sequence, read from disk when they are asked for.

    vocab_size: every id read is held to it. eos: the id that ends documents.
    """

    def __init__(self, parts: Sequence[Part], vocab_size: int, eos: int | None) -> None:
        self.parts = tuple(parts)
        self.vocab_size, self.eos = vocab_size, eos
        self._ends = list(accumulate(len(part.ids) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def documents(self) -> int | None:
        """How many there are; None where a file doesn't say."""
        counts = [part.documents for part in self.parts]
        return None if None in counts else sum(counts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 as int64 [stop - start]. Raises ValueError for a range outside
        or an id that is no token.
        """
        if not 0 <= start <= stop <= len(self):
            checks.fail("start, stop", f"a range in [0, {len(self)}]", (start, stop))
        found = np.empty(stop - start, np.int64)
        index, at = bisect_right(self._ends, start), start
        while at < stop:
            part = self.parts[index]
            begin = self._ends[index] - len(part.ids)
            end = min(stop, self._ends[index])
            ids = part.ids[at - begin : end - begin]
            part.check(ids, self.vocab_size, at - begin)
            found[at - start : end - start] = ids
            index, at = index + 1, end
        return found
