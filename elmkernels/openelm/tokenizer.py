"""Text to ids and back, by tokenizers that are borrowed: Hugging Face's or SentencePiece's.

OpenELM was trained on Llama 2's tokenizer, of which Apple ships no copy. A prompt begins with the
token <s> (`bos_token_id` of config.json), which is put there once, whatever the file says of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import raw_config

FILES = ("tokenizer.json", "tokenizer.model")
BOS, EOS = 1, 2  # Llama 2's, where no config.json says otherwise
# Tokens of the prompt that are decoded with what follows, as a token's text may depend on them.
_CONTEXT = 8
_INCOMPLETE = "\ufffd"  # what decoders give for the bytes of a character that has more to come


def find_tokenizer(given: str | Path | None, checkpoint: str | Path | None) -> Path | None:
    """The tokenizer's file: `given` (a file, or a folder that holds one of FILES), else the one
    beside the checkpoint, else None. Raises FileNotFoundError where `given` has none.
    """
    if given is not None:
        given = Path(given)
        found = given if given.is_file() else _inside(given)
        if found is None:
            raise FileNotFoundError(
                f"tokenizer must be a file or a folder with {' or '.join(FILES)}, got {given}"
            )
        return found
    if checkpoint is None:
        return None
    checkpoint = Path(checkpoint)
    return _inside(checkpoint if checkpoint.is_dir() else checkpoint.parent)


def _inside(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


class Tokenizer:
    """A tokenizer.json (needs `tokenizers`) or a SentencePiece .model (needs `sentencepiece`).

    bos: the id that a text begins with, None for none. Raises ImportError where the library is
    missing, ValueError for a file that it can't read.
    """

    def __init__(self, path: str | Path, bos: int | None = BOS) -> None:
        self.path, self.bos = Path(path), bos
        library = _HuggingFace if self.path.suffix == ".json" else _SentencePiece
        self._library = library(self.path)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, after one `bos`."""
        ids = self._library.encode(text)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, by all the library's threads."""
        start = [] if self.bos is None else [self.bos]
        batch = self._library.encode_batch(list(texts))
        return [ids if start and ids[:1] == start else [*start, *ids] for ids in batch]

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self._library.vocab_size()

    def id_of(self, names: Sequence[str]) -> int | None:
        """The id of the first of these tokens that the vocabulary has, None if it has none."""
        return next((i for i in map(self._library.id_of, names) if i is not None), None)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and ids that the tokenizer doesn't know."""
        return self._library.decode(list(ids))

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that tokens add to a prompt."""
        text = TextStream(self, prompt)
        return "".join(map(text.add, tokens)) + text.end()


class TextStream:
    """Text of tokens as they come: `add` gives what is certain by now, `end` the rest.

    A character may take several tokens (bytes), and a token's leading space shows only after
    another: each is decoded together with those before it, and the difference is what it adds.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        # A prompt may end inside a character: what completes it belongs to the new text.
        self._given = tokenizer.decode(self._ids).rstrip(_INCOMPLETE)

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._give(text)

    def end(self) -> str:
        """What is left, whole characters or not."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        self._ids = self._ids[-_CONTEXT:]
        self._given = self._tokenizer.decode(self._ids)
        return new


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ImportError(f"reading {path} needs tokenizers: pip install tokenizers") from error
        try:
            self._tokenizer = Library.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            message = f"reading {path} needs sentencepiece: pip install sentencepiece"
            raise ImportError(message) from error
        self._tokenizer: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._tokenizer.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.EncodeAsIds(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.EncodeAsIds(texts, num_threads=-1) if texts else []

    def vocab_size(self) -> int:
        return self._tokenizer.GetPieceSize()

    def id_of(self, name: str) -> int | None:
        found = self._tokenizer.PieceToId(name)
        return found if self._tokenizer.IdToPiece(found) == name else None

    def decode(self, ids: list[int]) -> str:
        size = self._tokenizer.GetPieceSize()
        return self._tokenizer.DecodeIds([i for i in ids if 0 <= i < size])


def special_tokens(checkpoint: str | Path | None) -> tuple[int | None, list[int]]:
    """bos_token_id and eos_token_id (a number or several) of a checkpoint's config.json; Llama 2's
    where there is none, or it doesn't say.
    """
    values: dict[str, Any] = {}
    if checkpoint is not None and Path(checkpoint).is_dir():
        values = raw_config(checkpoint)
    eos = values.get("eos_token_id", EOS)
    ends = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    return values.get("bos_token_id", BOS), ends
