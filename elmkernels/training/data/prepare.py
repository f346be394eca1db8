"""From a recipe's paths to tokens: text is tokenized once, into a file that is mapped ever after.

The file's name in the cache is made of everything that its tokens depend on, so other data or
another tokenizer never meets a stale one. It is written under another name and renamed when it is
whole: what an interrupted run leaves is never taken for finished.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ... import checks
from ..recipe import Data, Recipe, fit, model_config
from . import sources
from .sources import Piece
from .tokenizers import Tokenizer
from .tokenizers import load as load_tokenizer
from .tokens import DTYPES, Info, Tokens, dtype_for, open_part, read_info, sidecar

SPLITS = ("train", "validation")
# Bytes of text that are tokenized at once, and pieces of it.
_AT_ONCE, _PIECES_AT_ONCE = 1 << 22, 1024
# A partial file that nobody touched for so long is nobody's.
_STALE = 24 * 3600.0
_FORM = 1  # raised when the same sources would give other tokens than before

Progress = Callable[[int, int], None]


def prepare(
    recipe: Recipe, cache: str | Path, split: str, progress: Progress | None = None
) -> Tokens | None:
    """The tokens of a split ("train" or "validation"), None where the recipe gives it no paths.

    Texts come first, in the order of their sorted paths, then the .bin files. A file that
    validation has as well is left out of train. cache: the folder for tokenized text, made if need
    be. progress(done, total): called with bytes of the sources while text is tokenized.

    Raises FileNotFoundError for paths that mean nothing, ValueError or TypeError for data that
    can't be read or doesn't suit the model, ImportError where a library is missing and OSError
    where the cache can't be written.
    """
    if split not in SPLITS:
        checks.fail("split", " or ".join(SPLITS), repr(split))
    data = recipe.data
    if not getattr(data, split):
        return None
    config = model_config(recipe)
    fit(recipe, config)
    texts, bins = _files(data, split)
    infos = [read_info(path) for path in bins]
    tokenizer = None
    if texts or (data.eos is None and None in infos):
        tokenizer = load_tokenizer(data.tokenizer, data.eos)
        if tokenizer.vocab_size > config.vocab_size:
            checks.fail(
                "data.tokenizer",
                f"of at most {config.vocab_size} tokens (the model's vocab_size)",
                tokenizer.vocab_size,
            )
    eos = data.eos
    if eos is None:
        eos = tokenizer.eos if tokenizer else infos[0].eos
    # An id that the tokenizer doesn't know belongs to another one, even where the model has room.
    limit = tokenizer.vocab_size if tokenizer else config.vocab_size
    parts = [open_part(path, limit, eos) for path in bins]
    if texts:
        path = _tokenized(data, Path(cache), split, texts, tokenizer, progress)
        parts.insert(0, open_part(path, limit, eos))
    return Tokens(parts, limit, eos)


def _files(data: Data, split: str) -> tuple[list[Path], list[Path]]:
    """Texts and .bin files of a split."""
    found = sources.files(f"data.{split}", getattr(data, split))
    if split == "train" and data.validation:
        held_out = set(sources.files("data.validation", data.validation))
        found = [path for path in found if path not in held_out]
        if not found:
            raise ValueError("data.train must have files that data.validation has not, got none")
    bins = [path for path in found if sources.kind(path) == "bin"]
    return [path for path in found if path not in set(bins)], bins


def fingerprint(data: Data, files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Changes with the files (paths, sizes, times), the tokenizer, the field and the filters."""
    stats = [(str(path), path.stat()) for path in files]
    values = {
        "form": _FORM,
        "tokenizer": tokenizer.identity,
        "field": data.text_field,
        "filters": [data.min_characters, data.min_tokens],
        "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _tokenized(
    data: Data,
    cache: Path,
    split: str,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> Path:
    """The .bin of these texts in the cache, written unless it is there."""
    key = fingerprint(data, files, tokenizer)
    path = cache / f"{split}-{key[:16]}.bin"
    if _is_whole(path, key):
        return path
    with _reported(path):
        cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{path.stem}.*.partial"):
        if time.time() - left.lstat().st_mtime > _STALE:
            left.unlink(missing_ok=True)
    partial = cache / f"{path.stem}.{os.getpid()}.partial"
    try:
        info = _write(partial, data, files, tokenizer, key, progress)
        if not info.documents:
            checks.fail(
                f"data.{split}",
                f"texts of min_characters {data.min_characters}, min_tokens {data.min_tokens}",
                f"none in {len(files)} files",
            )
        # The JSON comes last: without it the .bin isn't taken for finished.
        with _reported(path):
            sidecar(path).unlink(missing_ok=True)
            partial.replace(path)
            info.write(partial)
            partial.replace(sidecar(path))
    finally:
        partial.unlink(missing_ok=True)
    return path


def _is_whole(path: Path, key: str) -> bool:
    """Whether the cache has these tokens, all of them."""
    if not path.is_file():
        return False
    try:
        info = read_info(path)
    except ValueError:  # not as it was written: tokenize again
        return False
    return (
        info is not None
        and info.fingerprint == key
        and path.stat().st_size == info.tokens * DTYPES[info.dtype].itemsize
    )


def _write(
    path: Path,
    data: Data,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    key: str,
    progress: Progress | None,
) -> Info:
    dtype = dtype_for(tokenizer.vocab_size)
    kept = _Kept(tokenizer, data.min_characters, data.min_tokens)
    total, written = sum(file.stat().st_size for file in files), 0
    with _reported(path):
        path.unlink(missing_ok=True)
        out = path.open("xb")  # never through a link
    with out:
        for batch, done in _batches(files, data.text_field):
            ids = kept.add(batch)
            with _reported(path):
                out.write(ids.astype(DTYPES[dtype]).tobytes())
            written += len(ids)
            if progress is not None:
                progress(done, total)
        with _reported(path):
            out.flush()
            os.fsync(out.fileno())
    return Info(dtype, tokenizer.vocab_size, tokenizer.eos, kept.documents, written, key)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Say what couldn't be written: the disk is full, the folder read-only."""
    try:
        yield
    except OSError as error:
        message = f"tokens can't be written to {path.parent} ({error.strerror}), none were kept"
        raise OSError(error.errno, message) from error


def _batches(files: Sequence[Path], field: str) -> Iterator[tuple[list[Piece], int]]:
    """Pieces of the files' documents, some megabytes at a time, and the bytes of files read."""
    batch: list[Piece] = []
    size = before = done = 0
    for file in files:
        for piece in sources.pieces(file, field):
            batch.append(piece)
            size += len(piece.text)
            done = before + piece.read
            if size >= _AT_ONCE or len(batch) >= _PIECES_AT_ONCE:
                yield batch, done
                batch, size = [], 0
        before += file.stat().st_size
        done = before
    if batch:
        yield batch, done


class _Kept:
    """Documents put together from their pieces, those that the filters leave."""

    def __init__(self, tokenizer: Tokenizer, min_characters: int, min_tokens: int) -> None:
        self.tokenizer, self.documents = tokenizer, 0
        self._least = (min_characters, min_tokens)
        self._waiting: list[np.ndarray] = []  # of a document that is too short so far
        self._begun = False
        self._characters = self._tokens = 0

    def add(self, batch: Sequence[Piece]) -> np.ndarray:
        """Ids that can be written by now, [n]."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        ready: list[np.ndarray] = []
        encoded = self.tokenizer.encode([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            if not self._begun and bos is not None and len(piece.text):
                self._waiting.append(np.array([bos]))
                self._tokens += 1
            self._begun |= len(piece.text) > 0
            self._waiting.append(ids)
            self._tokens += len(ids)
            if self._least[0]:
                self._characters += len(piece.text.decode("utf-8", "replace"))
            if piece.last:
                self._waiting.append(np.array([eos]))
                self._tokens += 1
            if self._begun and self._long_enough():
                ready += self._waiting
                self._waiting = []
                self.documents += piece.last
            if piece.last:
                self._waiting, self._begun = [], False
                self._characters = self._tokens = 0
        return np.concatenate(ready) if ready else np.zeros(0, np.int64)

    def _long_enough(self) -> bool:
        return self._characters >= self._least[0] and self._tokens >= self._least[1]
