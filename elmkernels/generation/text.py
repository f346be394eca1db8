"""The text of a row that is being generated, and the stop strings in it.

A stop string may begin and end inside of tokens. So it is looked for in the text, in what is still
to change as well: a row that ends there has that very text. What is given out never holds the
beginning of a stop string that the next token may complete.
"""

from collections.abc import Sequence

from ..openelm.tokenizer import TextStream, Tokenizer

_INCOMPLETE = "\ufffd"  # what stands for the bytes of a character that has more to come


class RowText:
    """The text that tokens add to a prompt, as they come. stops: strings that end it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stream, self._stops = TextStream(tokenizer, prompt), stops
        self._longest = max(map(len, stops), default=0)
        self._text = ""  # certain
        self.shown = 0  # characters of it that are given out

    @property
    def text(self) -> str:
        """What is certain, and no part of a stop string."""
        return self._text[: self.shown]

    def add(self, token: int) -> str | None:
        """The stop string that a token completes, if it completes one: the text then ends before
        it.
        """
        # None can lie wholly in what was looked through before.
        begin = max(0, len(self._text) - self._longest + 1)
        self._text += self._stream.add(token)
        if not self._stops:
            self.shown = len(self._text)
            return None
        whole = self._text + self._stream.pending().rstrip(_INCOMPLETE)
        at = [(whole.find(stop, begin), len(stop), stop) for stop in self._stops]
        found = min((place for place in at if place[0] >= 0), default=None)
        if found is not None:
            self._text = whole[: found[0]]
            self.shown = found[0]
            return found[2]
        self.shown = len(self._text) - self._begun()
        return None

    def end(self) -> None:
        """No token follows: all of the text is given out."""
        self._text += self._stream.end()
        self.shown = len(self._text)

    def _begun(self) -> int:
        """The characters at the end that a stop string may begin with."""
        longest = min(self._longest - 1, len(self._text))
        ends = (self._text[-n:] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(s.startswith(end) for s in self._stops)), 0)
