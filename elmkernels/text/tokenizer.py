"""Text to ids and back, at once (`Tokenizer`) and as tokens come (`TextStream`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import fail, is_integer
from .files import FILES, find_tokenizer, special_tokens
from .hub import local_path
from .libraries import HuggingFace, Library, SentencePiece
from .metadata import BOS

# The fewest tokens that are decoded with what follows, as a token's text may depend on them.
_CONTEXT = 8
_INCOMPLETE = "\ufffd"  # what decoders give for the bytes of a character that has more to come


class Tokenizer:
    """Text to ids and back, by a tokenizer.json (needs `tokenizers`) or a SentencePiece .model
    (needs `sentencepiece`).

    Args:
        path: the file.
        bos: the id that a text begins with, None for none.

    Attributes:
        path, bos: as they were given.

    Raises:
        ImportError: the library is missing.
        TypeError, ValueError: bos is no id, or the library can't read the file.

    Example:
        >>> tokenizer = Tokenizer.from_pretrained("OpenELM-270M")
        >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
        'Once upon a time'
    """

    def __init__(self, path: str | Path, bos: int | None = BOS) -> None:
        if bos is not None and (not is_integer(bos) or bos < 0):
            fail("bos", "a token id or None", repr(bos))
        self.path, self.bos = Path(path), None if bos is None else int(bos)
        library = HuggingFace if self.path.suffix == ".json" else SentencePiece
        self._library: Library = library(self.path)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint, whose texts begin as its config.json says.

        Args:
            path: the checkpoint's folder, a file in it, or a name that the Hub's cache knows.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: there is no such path, or the folder holds none.
            ImportError, ValueError: as the class raises them.
        """
        path = local_path(path)
        found = find_tokenizer(None, path)
        if found is None:
            raise FileNotFoundError(f"{path} has neither {' nor '.join(FILES)}")
        return cls(found, special_tokens(path)[0])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, after one `bos`.

        Args:
            text: whole characters; a surrogate is none.

        Returns:
            The ids.

        Raises:
            TypeError, ValueError: it is no text.
        """
        ids = self._library.encode(_checked_text("text", text))
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """What `encode` gives for each text, by all the library's threads.

        Args:
            texts: the texts.

        Returns:
            The ids of each.
        """
        start = [] if self.bos is None else [self.bos]
        given = [_checked_text(f"texts[{i}]", text) for i, text in enumerate(texts)]
        batch = self._library.encode_batch(given)
        return [ids if start and ids[:1] == start else [*start, *ids] for ids in batch]

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self._library.vocab_size()

    def id_of(self, names: Sequence[str]) -> int | None:
        """The id of the first of some tokens that the vocabulary has.

        Args:
            names: the tokens, as the file spells them.

        Returns:
            The id; None if it has none of them.
        """
        return next((i for i in map(self._library.id_of, names) if i is not None), None)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids, without special tokens and ids that the tokenizer doesn't know.

        Args:
            ids: [length]. Bytes that make no character are given as U+FFFD.

        Returns:
            The text.

        Raises:
            TypeError: they are no ids.
        """
        return self._library.decode([i for i in _ids("ids", ids) if 0 <= i < 2**31])

    def continuation(self, prompt: Sequence[int] | Tensor, tokens: Sequence[int] | Tensor) -> str:
        """The text that tokens add to a prompt: what is decoded of both, after the prompt's own. A
        prompt that ends inside a character is completed.

        Args:
            prompt, tokens: ids, one after the other.

        Returns:
            The text.
        """
        both = self.decode(_ids("prompt", prompt) + _ids("tokens", tokens))
        return both[_shared(self.decode(prompt), both) :]

    def unfinished(self, ids: Sequence[int]) -> bool:
        """Whether the text of ids may change with the next one: they end in a byte of which the
        library decodes all together, so that one that makes no character spoils those before it.

        Args:
            ids: the ids.

        Returns:
            Whether it may.
        """
        library = self._library
        last = next((i for i in reversed(ids) if not library.unseen(i)), None)
        return last in library.joined


def _ids(name: str, ids: Any) -> list[int]:
    """Ids of any sequence or array as Python's."""
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(found, Sequence) or not all(map(is_integer, found)):
        fail(name, "a list of token ids", f"{ids!r:.60}", TypeError)
    return [int(i) for i in found]


def _checked_text(name: str, text: str) -> str:
    if not isinstance(text, str):
        fail(name, "text", type(text).__name__, TypeError)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be whole characters, got {error.object!r:.60}") from error
    return text


def _shared(given: str, text: str) -> int:
    """How much of a text is a prompt's own, `given`. One that ends inside a character shares what
    is before that character with what completes it.
    """
    whole = not given.endswith(_INCOMPLETE) or text.startswith(given)
    return len(given if whole else given.rstrip(_INCOMPLETE))


class TextStream:
    """Text of tokens as they come: all that `add` and `end` give is what `continuation` gives.

    A character may take several tokens (bytes), and a token's leading space shows only after
    another: each is decoded together with those before it, and the difference is what it adds.
    Text that the next token may change waits for it.

    Args:
        tokenizer: whose ids they are.
        prompt: the ids before them.

    Example:
        >>> tokenizer = Tokenizer.from_pretrained("OpenELM-270M")
        >>> prompt, whole = tokenizer.encode("Once"), tokenizer.encode("Once upon")
        >>> text = TextStream(tokenizer, prompt)
        >>> "".join(map(text.add, whole[len(prompt) :])) + text.end()
        ' upon'
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | Tensor) -> None:
        self._tokenizer = tokenizer
        self._ids = _ids("prompt", prompt)
        self._given = tokenizer.decode(self._ids)

    def add(self, token: int) -> str:
        """Take a token.

        Args:
            token: its id.

        Returns:
            The text that is certain by now and was not given before.
        """
        self._ids += _ids("token", [token])
        if self._tokenizer.unfinished(self._ids):
            return ""
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith(_INCOMPLETE) else self._give(text)

    def pending(self) -> str:
        """What `end` would give now.

        Returns:
            The text, as it is if no token follows.
        """
        text = self._tokenizer.decode(self._ids)
        return text[_shared(self._given, text) :]

    def end(self) -> str:
        """Give what is left.

        Returns:
            The text, whole characters or not.
        """
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[_shared(self._given, text) :]
        count = _CONTEXT
        self._given = self._tokenizer.decode(self._ids[-count:])
        # A blank beginning may be stripped: what is decoded with the next must begin with more.
        while not self._given.strip() and count < len(self._ids):
            count *= 2
            self._given = self._tokenizer.decode(self._ids[-count:])
        self._ids = self._ids[-count:]
        return new
