"""Files of checkpoints: safetensors and torch.save read, safetensors and JSON written, in one step.

Tensors are mapped from their file, not copied, and the mapping is private: writing to them leaves
the file alone. A file is never written over, but replaced by name, so tensors that are mapped from
the old one keep it.

`replace_files` writes every file under a temporary name first, then a journal of the renames, then
renames. The journal's own rename is the moment the new files exist: before it the folder is the
old one, after it `Folder` finds the new files under either name, so that killing the process at
any point never mixes two checkpoints.

Files come from anywhere. What a reader finds in one is a value or a ValueError; a journal may name
only what `replace_files` itself writes there; and no tensor takes more memory than its file.
"""

import errno
import json
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .texts import is_plain_name, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES: dict[Any, str] = {
    dtype: name
    for name, dtype in (
        FLOATS | {"U32": torch.uint32, "I32": torch.int32, "U8": torch.uint8}
    ).items()
}
_JOURNAL = ".elmkernels-save.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.elmkernels-tmp")


class Stored(NamedTuple):
    """One tensor of a file, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


class Folder:
    """A checkpoint folder as its last completed save left it, whatever its files are called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        journal = _read_journal(path)
        self._renames = {name: temporary for temporary, name in journal["rename"].items()}
        self._removed = set(journal["remove"])

    def find(self, name: str) -> Path | None:
        """The file that holds what was saved as `name`; None if there is none."""
        renamed = self.path / self._renames.get(name, name)
        for candidate in (renamed, self.path / name):
            if candidate.is_file() and name not in self._removed:
                return candidate
        return None


def folder_weights(folder: Folder) -> list[Stored]:
    single = folder.find(WEIGHTS)
    if single is not None:
        return read_safetensors(single)
    index = folder.find(INDEX)
    if index is None:
        raise FileNotFoundError(f"{folder.path} holds neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_plain_name, weight_map.values())):
        raise ValueError(f"{index}: weight_map must map keys to file names of its folder")
    files = {name: folder.find(name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, not found beside it")
    return [
        stored
        for name, file in files.items()
        if file is not None
        for stored in read_safetensors(file)
        if weight_map.get(stored.key, name) == name
    ]


def check_readable(file: Path) -> None:
    """Raise OSError, which says so, for a file that can't be opened: its reader's own words would
    be about what is in it.
    """
    try:
        file.open("rb").close()
    except OSError as error:
        message = f"{file} can't be read: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, message) from error


def read_safetensors(file: Path) -> list[Stored]:
    from safetensors import (  # late: `import elmkernels` needs torch alone
        SafetensorError,
        safe_open,
    )

    check_readable(file)
    try:
        handle = safe_open(file, framework="pt")
        slices = {key: handle.get_slice(key) for key in handle.keys()}
        return [
            Stored(file, key, tuple(s.get_shape()), s.get_dtype(), partial(handle.get_tensor, key))
            for key, s in slices.items()
        ]
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def read_torch_file(file: Path) -> list[Stored]:
    check_readable(file)
    try:
        # Only torch.save's zip format, the default since torch 1.6, can be mapped.
        mapped = zipfile.is_zipfile(file)
        if mapped:
            _check_stored_whole(file)
        values = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its reader stumbles over
        raise ValueError(f"{file} is not a complete torch.save file: {error}") from error
    if isinstance(values, Mapping) and isinstance(values.get("model_state_dict"), Mapping):
        values = values["model_state_dict"]
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must hold a state dict, got {type(values).__name__}")
    stored = []
    for key, value in values.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        stored.append(Stored(file, str(key), shape, _kind(value), lambda value=value: value))
    return stored


def _check_stored_whole(file: Path) -> None:
    """Raise ValueError for an archive with compressed parts, which torch.save never writes: they
    may be a thousand times as large in memory.
    """
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {part.filename} is compressed")


def _kind(value: Any) -> str:
    """The dtype of a plain tensor; of anything else what it is."""
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.device.type != "cpu"):
        return f"{value.layout} on {value.device}"
    found = getattr(value, "dtype", None)
    return DTYPE_NAMES.get(found, str(found or type(value).__name__))


def write_safetensors(
    file: Path, weights: Mapping[str, Tensor], shown: Callable[[list[str]], Iterable[str]] = list
) -> None:
    """One tensor at a time: the library's own writer holds a copy of all of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The format allows no gaps. In the order of the largest power of two that divides their sizes,
    # tensors start at a multiple of it: all the large ones at one of ALIGNMENT.
    order = sorted(weights, key=lambda key: -_alignment(weights[key].nbytes))
    for key in order:
        weight, start = weights[key], end
        end += weight.nbytes
        header[key] = {
            "dtype": DTYPE_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key in shown(order):
            weight = weights[key].detach().to("cpu").contiguous()
            out.write(weight.reshape(-1, 1).view(torch.uint8).numpy().data)
        _sync_file(out)


def _alignment(size: int) -> int:
    return min(size & -size, ALIGNMENT) or ALIGNMENT


def write_json(file: Path, values: Any) -> None:
    with open(file, "w", encoding="utf-8") as out:
        out.write(json.dumps(values, indent=2) + "\n")
        _sync_file(out)


def _sync_file(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a crash of the machine."""
    if os.name != "posix":  # elsewhere a folder can't be opened, nor need its entries be synced
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder with its parents; gives those that were missing, the innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        folder.mkdir(exist_ok=True)  # refuses a file
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(made: list[Path]) -> None:
    """Take away folders that were made for nothing; what is in use by now stays."""
    for path in made:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def made_folder(folder: Path) -> Iterator[list[Path]]:
    """The folder for a block that fills it: if it raises, what was made and is empty goes again."""
    made = make_folder(folder)
    try:
        yield made
    except BaseException:
        remove_empty(made)
        raise


def try_to_write(folder: Path) -> None:
    """Raise OSError if no file can be written to a folder."""
    probe = folder / f".probe.{secrets.token_hex(4)}.elmkernels-tmp"
    try:
        probe.write_bytes(b" ")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to: it takes the place of `path` if the block ends well, and is
    gone if it raises, so that nobody ever reads half of a file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.elmkernels-tmp")
    try:
        with told(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Around writing: say what couldn't be written, and that it is still what it was. (The system's
    own words on a full disk name no file.)
    """
    try:
        yield
    except OSError as error:
        message = f"{path} can't be written: {error.strerror or error}; it is as it was before"
        raise OSError(error.errno or errno.EIO, message) from error


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Make the folder hold what the writers write, by name, in place of its checkpoint.

    Raises ValueError for a folder whose journal no save has written, and OSError if a file can't be
    written; the folder is then what it was.
    """
    for name in writers:
        if not is_plain_name(name):
            raise ValueError(f"a file must be named as an entry of {folder}, got {name!r}")
    with told(folder), made_folder(folder):
        _finish_renames(folder)
        _write_and_rename(folder, writers)


def _write_and_rename(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    token = secrets.token_hex(4)
    temporary = {name: f".{name}.{token}.elmkernels-tmp" for name in writers}
    stale = [
        entry.name
        for entry in folder.iterdir()
        if _holds_weights(entry.name) and entry.name not in writers
    ]
    try:
        for name, write in writers.items():
            write(folder / temporary[name])
        sync_folder(folder)
        journal = folder / f".journal.{token}.elmkernels-tmp"
        write_json(journal, {"rename": {t: name for name, t in temporary.items()}, "remove": stale})
        os.replace(journal, folder / _JOURNAL)
    except BaseException:
        _remove_temporaries(folder, only=token)
        raise
    sync_folder(folder)
    _finish_renames(folder)
    _remove_temporaries(folder)


def _holds_weights(name: str) -> bool:
    return name in (WEIGHTS, INDEX) or _SHARD.fullmatch(name) is not None


def _read_journal(folder: Path) -> dict[str, Any]:
    """What is left of a save. A journal may come from anywhere, so it is held to what saves write:
    temporaries of this folder, each to be named as it says itself, and weights of this folder.
    """
    file = folder / _JOURNAL
    if not file.is_file():
        return {"rename": {}, "remove": []}
    journal = read_json(file)
    rename, remove = journal.get("rename"), journal.get("remove")
    if not isinstance(rename, dict) or not isinstance(remove, list):
        raise ValueError(f"{file} must have an object `rename` and a list `remove`")
    for temporary, name in rename.items():
        written = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.elmkernels-tmp", temporary, re.DOTALL)
        if written is None or written[1] != name or not is_plain_name(name) or name == _JOURNAL:
            raise ValueError(
                f"{file}: rename must give files that a save has written here their names, "
                f"got {temporary!r} for {name!r}"
            )
    for name in remove:
        if not isinstance(name, str) or not _holds_weights(name) or name in rename.values():
            raise ValueError(f"{file}: remove must name weights of this folder, got {name!r}")
    if len(set(rename.values())) != len(rename):
        raise ValueError(f"{file}: rename must give every name once, got {sorted(rename.values())}")
    return {"rename": rename, "remove": remove}


def _finish_renames(folder: Path) -> None:
    """Carry out what the journal says is left of a save; a second time does no harm."""
    journal = _read_journal(folder)
    for temporary, name in journal["rename"].items():
        if (folder / temporary).is_file():
            os.replace(folder / temporary, folder / name)
    for name in journal["remove"]:
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    (folder / _JOURNAL).unlink(missing_ok=True)


def _remove_temporaries(folder: Path, only: str = "") -> None:
    for entry in folder.iterdir():
        if _TEMPORARY.fullmatch(entry.name) and only in entry.name:
            entry.unlink(missing_ok=True)
