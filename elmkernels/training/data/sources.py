"""Where text comes from: which files the paths of a recipe mean, and the documents in them.

A text file is one document, a line of .jsonl (.jsonl.gz, .json.gz) and a row of .parquet as well.
Anything else that ends in .gz is a compressed text.
"""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ... import checks

STDLIB = "stdlib"
# Folders of Python's library that are left out: what others installed, and its tests.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_JSONL = (".jsonl", ".jsonl.gz", ".json.gz")
# What is taken from a folder; other texts by a glob or one by one.
_IN_FOLDERS = (*_JSONL, ".parquet", ".bin", ".txt", ".md", ".rst", ".py", ".txt.gz")
# Texts are read by so much at once: a document may be larger than the memory. Tokenizers that
# merge see a seam there, at the end of a line where there is one.
PIECE = 1 << 22


class Piece(NamedTuple):
    """Consecutive text of a document, UTF-8 where the document is; and whether it ends with it.
    read: how far into its file that was.
    """

    text: bytes
    last: bool
    read: int


def kind(path: Path) -> str:
    """jsonl, parquet, bin or text."""
    name = path.name.lower()
    if name.endswith(_JSONL):
        return "jsonl"
    return {".parquet": "parquet", ".bin": "bin"}.get(path.suffix.lower(), "text")


def files(section: str, paths: Iterable[str]) -> list[Path]:
    """Every file that some of the paths mean, once, sorted. Raises FileNotFoundError naming the
    field `section` where a path means none.
    """
    found: set[Path] = set()
    for given in paths:
        matched = _expand(given)
        if not matched:
            raise FileNotFoundError(f"{section}: {given} is no file, folder or glob of any")
        # Not resolved: a link may lead to a file that says nothing of its kind.
        found |= {Path(os.path.abspath(path)) for path in matched}
    # The JSON beside a .bin belongs to it and is no text.
    return sorted(p for p in found if p.suffix != ".json" or p.with_suffix(".bin") not in found)


def _expand(given: str) -> list[Path]:
    head, _, rest = given.replace("\\", "/").partition("/")
    if head == STDLIB and not Path(given).exists():
        return _stdlib(rest)
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _inside(path)
    return [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]


def _inside(folder: Path) -> list[Path]:
    return _walk(folder, _IN_FOLDERS, lambda name: name.startswith("."))


def _walk(folder: Path, endings: tuple[str, ...], skip: Callable[[str], bool]) -> list[Path]:
    """Files below a folder by the ending of their names, without those of names to skip."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not skip(name)]
        wanted = [name for name in names if name.lower().endswith(endings) and not skip(name)]
        found += [_regular(Path(root, name)) for name in wanted]
    return found


def _regular(path: Path) -> Path:
    """The path of a file; a pipe or a device would be read for ever."""
    if not path.is_file():
        got = "a pipe or a device" if path.exists() else "a link to nothing"
        checks.fail(str(path), "a file", got)
    return path


def _stdlib(rest: str) -> list[Path]:
    """Python's own library, or what lies under one of its folders (a file or glob in it)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if (root / rest).is_dir():
        return _walk(root / rest, (".py",), _NOT_STDLIB.__contains__)
    chosen = (path for path in root.glob(rest) if path.suffix == ".py" and path.is_file())
    return [path for path in chosen if not _NOT_STDLIB & set(path.relative_to(root).parts)]


def pieces(path: Path, field: str) -> Iterator[Piece]:
    """The documents of a file that isn't a .bin; `field` is where .jsonl and .parquet have them.

    Raises ValueError naming file, line and field for what can't be read, ImportError where
    .parquet needs a library.
    """
    try:
        yield from {"jsonl": _jsonl, "parquet": _parquet, "text": _text}[kind(path)](path, field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _opened(raw: IO[bytes], path: Path) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def _text(path: Path, field: str) -> Iterator[Piece]:
    with path.open("rb") as raw, _opened(raw, path) as file:
        kept, more = b"", file.read(PIECE)
        while more:
            text, more = kept + more, file.read(PIECE)
            cut = _cut(text) if more else len(text)
            kept = text[cut:]
            yield Piece(text[:cut], not more, raw.tell())


def _cut(text: bytes) -> int:
    """Where a long text is best divided: after its last line, else before its last character."""
    line = text.rfind(b"\n") + 1
    if line:
        return line
    end = len(text) - 1
    while end > max(len(text) - 4, 0) and text[end] & 0xC0 == 0x80:  # inside a character of UTF-8
        end -= 1
    return max(end, 1)


def _jsonl(path: Path, field: str) -> Iterator[Piece]:
    with path.open("rb") as raw, _opened(raw, path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from error
            if not isinstance(values, dict):
                checks.fail(where, f"an object with the field {field}", type(values).__name__)
            yield Piece(_value(where, values, field), True, raw.tell())


def _value(where: str, values: dict, field: str) -> bytes:
    if field not in values:
        raise ValueError(f"{where} has no field {field} (data.text_field), it has {list(values)}")
    text = values[field]
    if not isinstance(text, str):
        checks.fail(f"{where}: {field}", "a string", type(text).__name__)
    return text.encode("utf-8", "replace")  # JSON can say half a surrogate pair


def _parquet(path: Path, field: str) -> Iterator[Piece]:
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise ImportError(f"reading {path} needs datasets: pip install datasets") from error
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        names = rows.column_names
        if names is None:
            names = list(next(iter(rows), {}))
        if field not in names:
            raise ValueError(f"{path} has no field {field} (data.text_field), it has {names}")
        for number, row in enumerate(rows.select_columns([field]), 1):
            yield Piece(_value(f"{path}, row {number}", row, field), True, 0)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error
