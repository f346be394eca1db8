"""What an evaluation has computed, kept as it comes, so that an interrupted one goes on.

A file for each kind of request of each task: its first line says of which requests, the others give
the results of a unit each. A line that was cut off counts as not there.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..weights.storage import Folder
from ..weights.texts import is_plain_name

FOLDER = "requests"
_PIECES, _PIECE = 64, 4096  # of each file of weights, evenly spread


def digest(values: Any) -> str:
    """A fingerprint of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def checkpoint_fingerprint(path: Path) -> str:
    """What tells a checkpoint from another one: its configuration and tokenizer, and of each file
    of weights the size and some pieces of it, of which another training leaves none.

    Args:
        path: a folder, or one file.
    """
    found = hashlib.sha256()
    for file in sorted(_files(path)):
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as data:
            if size <= _PIECES * _PIECE:
                found.update(data.read())
                continue
            for i in range(_PIECES):
                data.seek((size - _PIECE) * i // (_PIECES - 1))
                found.update(data.read(_PIECE))
    return found.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = Folder(path)
    names = [p.name for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".model")]
    found = [folder.find(name) for name in names if is_plain_name(name)]
    return [file for file in found if file is not None]


class Store:
    """Results of units in a folder.

    Args:
        folder: where; None keeps nothing.
        about: what computes them: another checkpoint, dtype or device is another text.
    """

    def __init__(self, folder: Path | None, about: Any = None) -> None:
        self.folder = None if folder is None else folder / FOLDER
        self.about = about

    def open(self, name: str, requests: Any, units: int) -> "Kept":
        """The results of one kind of request of one task.

        Args:
            name: of the file.
            requests: what is asked for, as JSON has it.
            units: how many there are.

        Returns:
            What is there already; more can be added.

        Raises:
            ValueError: the file is of other requests, or of another model.
        """
        if self.folder is None:
            return Kept(None, {}, units)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.jsonl"
        head = {"fingerprint": digest([self.about, requests]), "units": units}
        lines = list(_lines(file)) if file.is_file() else []
        if lines and lines[0] != head:
            raise ValueError(
                f"{file} is of another checkpoint or of other requests (data, examples, limit, "
                "dtype, device): give another folder, or remove it"
            )
        done = {line["unit"]: line["results"] for line in lines[1:]}
        kept = Kept(file, {u: r for u, r in done.items() if 0 <= u < units}, units)
        kept.begin(head)
        return kept


class Kept:
    """What is kept of one file: `done` has the results of units by their number."""

    def __init__(self, file: Path | None, done: dict[int, Any], units: int) -> None:
        self.file, self.done, self.units = file, done, units

    def begin(self, head: dict[str, Any]) -> None:
        """Write the file anew with what is known: without a line that was cut off."""
        if self.file is None:
            return
        lines = [head, *({"unit": u, "results": r} for u, r in sorted(self.done.items()))]
        beside = self.file.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(beside, self.file)

    def add(self, unit: int, results: Sequence[Any]) -> None:
        """Keep the results of a unit."""
        self.done[unit] = list(results)
        if self.file is not None:
            with open(self.file, "a") as out:
                out.write(json.dumps({"unit": unit, "results": list(results)}) + "\n")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """What a file holds up to the first line that isn't whole."""
    for line in file.read_text(errors="replace").splitlines(keepends=True):
        try:
            values = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            return
        if not isinstance(values, dict):
            return
        yield values
