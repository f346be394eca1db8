"""Tokens that files beside a tokenizer add to it (added_tokens.json and its kin), and the text and
the ids of a SentencePiece model that has some.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import is_integer
from .metadata import parsed

_FILES = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")
_SPECIAL = "special_tokens_map.json"
_MOST = 2**31 - 1  # an id


class Added(NamedTuple):
    """An added token. special: it is no text; left and right: it takes the blanks there too."""

    text: str
    special: bool
    left: bool = False
    right: bool = False

    def said(self) -> dict[str, Any]:
        """As tokenizer_config.json says it."""
        flags = {"special": self.special, "lstrip": self.left, "rstrip": self.right}
        return {"content": self.text, **flags}


def added_tokens(read: Callable[[str], bytes | None]) -> dict[int, Added]:
    """{id: token} of all that the files add.

    Args:
        read: gives what a file of a name holds, None if it isn't there.

    Returns:
        The tokens; what several files say of one is put together.

    Raises:
        ValueError: a file isn't JSON, or an entry has no text or no id.
    """
    special = set()
    if (data := read(_SPECIAL)) is not None:
        special = set(_texts(list(parsed(_SPECIAL, data).values())))
    found: dict[int, Added] = {}
    for name in _FILES:
        data = read(name)
        for i, entry in () if data is None else _entries(name, parsed(name, data)):
            text = entry.get("content")
            if not (is_integer(i) and 0 <= i <= _MOST and _is_text(text)):
                raise ValueError(f"{name} must give added tokens a text and an id, got {i!r:.60}")
            before = found.get(i, Added(text, False))
            found[i] = Added(
                text,
                bool(entry.get("special")) or before.special or text in special,
                bool(entry.get("lstrip", before.left)),
                bool(entry.get("rstrip", before.right)),
            )
    return found


def added_beside(folder: Path) -> dict[int, Added]:
    """The same of the files in a folder."""

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return added_tokens(read)


def _is_text(text: object) -> bool:
    """Whole characters, at least one; a surrogate is none."""
    return isinstance(text, str) and bool(text) and not re.search("[\ud800-\udfff]", text)


def _texts(values: list[Any]) -> Iterator[str]:
    """special_tokens_map.json's: a text, {"content": text} or a list of them."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)
        elif isinstance(value, Mapping) and isinstance(value.get("content"), str):
            yield value["content"]


def _entries(name: str, values: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(id, what is said of it) of what a file adds."""
    if name == "added_tokens.json":
        yield from ((i, {"content": text}) for text, i in values.items())
        return
    if name == "tokenizer.json":
        listed = values.get("added_tokens") or []
        if not isinstance(listed, list):
            raise ValueError(f"{name}: added_tokens must be a list, got {type(listed).__name__}")
        found = [(e.get("id"), e) for e in listed if isinstance(e, Mapping)]
    else:
        decoder = values.get("added_tokens_decoder") or {}
        known = decoder.items() if isinstance(decoder, Mapping) else ()
        found = [(int(i) if i.isdecimal() else i, e) for i, e in known if isinstance(e, Mapping)]
    yield from found


def _pattern(texts: Iterable[str]) -> str:
    """Any of some texts, the longest of those that begin at a place. By their first characters, so
    that most places of a text are passed over at once.
    """
    by_first: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        by_first.setdefault(text[0], []).append(re.escape(text[1:]))
    return "|".join(f"{re.escape(c)}(?:{'|'.join(rest)})" for c, rest in by_first.items())


class AddedTokens:
    """Where added tokens are in a text and among ids.

    Args:
        tokens: {id: token}.
    """

    def __init__(self, tokens: Mapping[int, Added]) -> None:
        self._tokens = tokens
        self._ids = {token.text: i for i, token in tokens.items()}
        self._any = re.compile(_pattern(self._ids)) if self._ids else None

    def id_of(self, text: str) -> int | None:
        """The id of an added token by its text."""
        return self._ids.get(text)

    @property
    def count(self) -> int:
        """One more than the largest id, 0 without any."""
        return max(self._tokens, default=-1) + 1

    def in_text(self, text: str) -> list[str | int]:
        """A text in pieces: other text, which isn't empty, and the ids of added tokens.

        Args:
            text: the text.

        Returns:
            The pieces in their order.
        """
        if self._any is None:
            return [text] if text else []
        found: list[str | int] = []
        end, right = 0, False
        for match in self._any.finditer(text):
            i = self._ids[match[0]]
            between = text[end : match.start()]
            between = between.lstrip() if right else between
            between = between.rstrip() if self._tokens[i].left else between
            found += [between, i] if between else [i]
            end, right = match.end(), self._tokens[i].right
        rest = text[end:].lstrip() if right else text[end:]
        return [*found, rest] if rest else found

    def in_ids(self, ids: list[int]) -> list[str | list[int]]:
        """Ids in pieces: runs of others, and the texts of added tokens; special ones are dropped.

        Args:
            ids: the ids.

        Returns:
            The pieces in their order.
        """
        found: list[str | list[int]] = []
        for i in ids:
            token = self._tokens.get(i)
            if token is not None:
                if not token.special:
                    found.append(token.text)
            elif found and isinstance(found[-1], list):
                found[-1].append(i)
            else:
                found.append([i])
        return found
