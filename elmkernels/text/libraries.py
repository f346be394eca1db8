"""The libraries that read tokenizers, each behind the same methods.

`joined` are the ids of bytes of which the library decodes a whole run or, if one of them makes no
character, none: U+FFFD for each. `unseen(i)` says whether `decode` passes over an id, even amid
such a run.
"""

from pathlib import Path
from typing import Any, Protocol

from ..weights.storage import check_readable
from .added import AddedTokens, added_beside


class Library(Protocol):
    """What a Tokenizer needs of one. Made of a file; raises ImportError where the library is
    missing, OSError for a file that can't be read, ValueError for one that isn't what it should be.
    """

    joined: frozenset[int]

    def unseen(self, i: int) -> bool: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def vocab_size(self) -> int: ...

    def id_of(self, name: str) -> int | None: ...

    def decode(self, ids: list[int]) -> str: ...


class HuggingFace:
    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise ImportError(f"reading {path} needs tokenizers: pip install tokenizers") from error
        check_readable(path)
        try:
            self._tokenizer = Library.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.joined = self._joined()

    def unseen(self, i: int) -> bool:
        return i in self._special or not 0 <= i < 2**31 or self._tokenizer.id_to_token(i) is None

    def _joined(self) -> frozenset[int]:
        names = (f"<0x{byte:02{case}}>" for byte in range(256) for case in "Xx")
        found = frozenset(i for i in map(self.id_of, names) if i is not None)
        a, lead = self.id_of("<0x41>"), self.id_of("<0xE2>")
        if a is None or lead is None:
            return found
        return frozenset() if self.decode([a, lead]).startswith("A") else found

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


class SentencePiece:
    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            message = f"reading {path} needs sentencepiece: pip install sentencepiece"
            raise ImportError(message) from error
        self._tokenizer: Any = sentencepiece.SentencePieceProcessor()
        check_readable(path)
        try:
            self._tokenizer.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error
        self.joined = frozenset[int]()  # bytes are decoded character by character
        self._added = AddedTokens(added_beside(path.parent))

    def unseen(self, i: int) -> bool:
        return False  # a token without text ends what bytes make a character

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        pieces = [self._added.in_text(text) for text in texts]
        plain = [p for found in pieces for p in found if isinstance(p, str)]
        several = {"num_threads": -1} if len(plain) > 1 else {}
        ids = iter(self._tokenizer.EncodeAsIds(plain, **several) if plain else [])
        return [
            [i for p in found for i in (next(ids) if isinstance(p, str) else [p])]
            for found in pieces
        ]

    def vocab_size(self) -> int:
        return max(self._tokenizer.GetPieceSize(), self._added.count)

    def id_of(self, name: str) -> int | None:
        added = self._added.id_of(name)
        if added is not None:
            return added
        found = self._tokenizer.PieceToId(name)
        return found if self._tokenizer.IdToPiece(found) == name else None

    def decode(self, ids: list[int]) -> str:
        size = self._tokenizer.GetPieceSize()
        return "".join(
            p if isinstance(p, str) else self._tokenizer.DecodeIds([i for i in p if 0 <= i < size])
            for p in self._added.in_ids(ids)
        )
