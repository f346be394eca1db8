"""The tokenizers of training: bytes, which need nothing, and whatever the project can load."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ... import checks
from ...openelm.tokenizer import FILES, find_tokenizer, special_tokens
from ...openelm.tokenizer import Tokenizer as Borrowed
from ...text.added import Added, added_beside
from ...text.metadata import parsed

# Names that an end of document and a beginning go by, where no config.json gives their ids.
_EOS_NAMES = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
_BOS_NAMES = ("<s>",)


class Tokenizer(Protocol):
    """What the data needs of one. eos ends every document, bos (where there is one) begins it."""

    vocab_size: int
    eos: int
    bos: int | None
    identity: str  # differs where ids do

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, without bos and eos: integers [n]."""

    def save(self, folder: Path) -> None:
        """Write the file that the project's generation reads."""


class Bytes:
    """Ids 0 .. 255 are the bytes, 256 ends a document."""

    vocab_size, eos, bos, identity = 257, 256, None, "bytes"

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def save(self, folder: Path) -> None:
        """A tokenizer.json with these ids: single bytes and no merges."""
        values = {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": self.eos,
                    "content": "<eos>",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ],
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "model": {
                "type": "BPE",
                "vocab": {**_byte_characters(), "<eos>": self.eos},
                "merges": [],
            },
        }
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (Path(folder) / FILES[0]).write_text(text, encoding="utf-8")


def _byte_characters() -> dict[str, int]:
    """The printable character that a byte-level tokenizer.json writes for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    written = {chr(byte): byte for byte in plain}
    return written | {chr(256 + i): byte for i, byte in enumerate(rest)}


class File:
    """A tokenizer.json or SentencePiece .model; bos and eos by the checkpoint's config.json where
    one lies beside it, else by the usual names.
    """

    def __init__(self, path: Path, eos: int | None = None) -> None:
        self.path = path
        self._tokenizer = Borrowed(path, bos=None)
        self.vocab_size = self._tokenizer.vocab_size
        beside: dict[str, Any] = {}
        if (path.parent / "config.json").is_file():
            bos, ends = special_tokens(path.parent)
            beside = {"bos": bos, "eos": ends[0] if ends else None}
        self.bos = beside["bos"] if beside else self._tokenizer.id_of(_BOS_NAMES)
        known = beside["eos"] if beside else self._tokenizer.id_of(_EOS_NAMES)
        found = known if eos is None else eos
        if found is None:
            raise ValueError(
                f"data.eos must be given: {path} has none of {', '.join(_EOS_NAMES)}, got null"
            )
        if found >= self.vocab_size:
            checks.fail("data.eos", f"in [0, {self.vocab_size}) (the tokenizer's)", found)
        self.eos = found
        # By content: the same tokenizer in another place gives the same ids.
        digest = hashlib.sha256(path.read_bytes())
        self._added = {} if path.suffix == ".json" else added_beside(path.parent)
        if self._added:
            digest.update(repr(sorted(self._added.items())).encode())
        self.identity = f"{path.suffix} {digest.hexdigest()} bos {self.bos} eos {found}"

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8", "replace") for text in texts]
        return [np.asarray(ids, np.int64) for ids in self._tokenizer.encode_batch(decoded)]

    def save(self, folder: Path) -> None:
        """A copy of the file, under the name that a checkpoint's folder has for its kind."""
        name = FILES[0] if self.path.suffix == ".json" else FILES[1]
        target = Path(folder) / name
        if not (target.exists() and target.samefile(self.path)):
            shutil.copyfile(self.path, target)
        if self._added and added_beside(Path(folder)) != self._added:
            _write_added(Path(folder), self._added)


def _write_added(folder: Path, tokens: Mapping[int, Added]) -> None:
    """Say in a folder's tokenizer_config.json what is added to its tokenizer."""
    path = folder / "tokenizer_config.json"
    said = parsed(path, path.read_bytes()) if path.is_file() else {}
    said["added_tokens_decoder"] = {str(i): token.said() for i, token in sorted(tokens.items())}
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def load(name: str, eos: int | None = None) -> Tokenizer:
    """`bytes`, or a tokenizer's file, or a folder that holds one. eos: instead of its own.

    Raises FileNotFoundError, ValueError, and ImportError where its library is missing.
    """
    if name == "bytes":
        if eos not in (None, Bytes.eos):
            checks.fail("data.eos", f"null or {Bytes.eos} with the tokenizer bytes", eos)
        return Bytes()
    found = find_tokenizer(name, None)
    if found is None:  # not with a name given, but the type says so
        raise FileNotFoundError(f"data.tokenizer: {name} has no tokenizer")
    return File(found, eos)


def save(folder: str | Path, name: str = "bytes", eos: int | None = None) -> dict[str, Any]:
    """Write the tokenizer's file into a checkpoint's folder; gives what its config.json must say:
    {bos_token_id, eos_token_id}.
    """
    tokenizer = load(name, eos)
    tokenizer.save(Path(folder))
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
