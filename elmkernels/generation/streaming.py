"""The steps of one generation."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..acceleration.decode_modes import CALLS
from ..checks import fail, integer, is_integer
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..openelm.tokenizer import Tokenizer
from .drafts import Draft
from .gpu_decoder import Decoder
from .pace import Pace
from .prompts import Prompts, check_lengths, check_tokenizer, prompt_ids, stop_set, stop_texts
from .row import Row
from .sampling import Sampler, Sampling, check_choices
from .speculation import Counts, Speculation
from .step import next_logits
from .text import RowText

CHUNK = 512


class Holder(Protocol):
    """What holds the cache of a stream: a `Session`."""

    model: OpenELM
    cache: KVCache
    ids: list[list[int]]
    current: "Stream | None"  # the one stream that may go on

    def begin(self, prompts: Sequence[list[int]]) -> list[int]: ...

    def prefill(self, chunk: int) -> Tensor: ...

    def decoder(self) -> Decoder | None: ...

    def drafting(self) -> tuple[Draft, Pace] | None: ...


class Stream(Iterator[list[int | None]]):
    """The steps of one generation: each gives a token a row, None for a row that has ended. With a
    draft too: tokens of a row that got more than others wait, and are in `rows` once given.

    Args:
        session, prompts, max_new_tokens, stop_tokens, stop_strings, tokenizer, chunk, sampling: as
            `Session` and `generate` have them; `Session.stream` and `stream` make one.

    Attributes:
        rows: what was generated so far.
        interrupted: whether a KeyboardInterrupt ended it; that one is not raised again.
        reused: the tokens of each prompt that the session held already.

    Example:
        >>> steps = Session(model).stream([[1, 2, 3]], 4)
        >>> len([token for (token,) in steps]), steps.rows[0].finish_reason
        (4, 'length')
    """

    def __init__(
        self,
        session: Holder,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        stop_tokens: int | Iterable[int] | None = None,
        stop_strings: str | Iterable[str] = (),
        tokenizer: Tokenizer | None = None,
        chunk: int = CHUNK,
        **sampling: Any,
    ) -> None:
        config, cache = session.model.config, session.cache
        check_tokenizer(tokenizer)
        ids = prompt_ids(prompts, config, tokenizer)
        if len(ids) != cache.batch:
            raise ValueError(
                f"prompts must be {cache.batch}, as the session's batch, got {len(ids)}"
            )
        steps = check_lengths(ids, max_new_tokens, cache.max_length, "the cache's max_length")
        self.session, self.chunk, self.steps_left = session, integer("chunk", chunk, 1), steps
        self.stops = stop_set(stop_tokens, config)
        texts = stop_texts(stop_strings, tokenizer)
        self.sampler = Sampler(Sampling(**sampling), ids, config.vocab_size, cache.device, steps)
        self.rows = [Row(text=None if tokenizer is None else "") for _ in ids]
        self._texts = [] if tokenizer is None else [RowText(tokenizer, p, texts) for p in ids]
        self.interrupted = False
        self.reused = session.begin(ids)
        self._prompts = [len(prompt) for prompt in ids]
        self._last: Tensor | None = None  # the tokens of the last step, not in the cache yet
        self._speculation: Speculation | None = None  # what goes on after it with a draft
        self._decoder: Decoder | None = None  # what goes on after the prompt, if not calls
        if not steps:
            self._end("length")

    def __next__(self) -> list[int | None]:
        if not self.steps_left:
            raise StopIteration
        if self.session.current is not self:
            raise RuntimeError("the session was reset, or began another stream, before this ended")
        try:
            return self._step()
        except KeyboardInterrupt:
            self.interrupt()
        except BaseException:
            self._end("failed")
            raise
        raise StopIteration

    def text(self, row: int = 0) -> Iterator[str]:
        """Take the steps that are left, for the text of a row as it comes.

        Args:
            row: whose.

        Returns:
            An iterator of pieces, none empty: what no token can change any more, and what can't be
            the beginning of a stop string.

        Raises:
            ValueError: there is no tokenizer, or no such row.

        Example:
            >>> tokenizer = Tokenizer.from_pretrained("OpenELM-270M")
            >>> run = stream(model, ["Once upon a time"], 8, tokenizer=tokenizer)
            >>> for piece in run.text():
            ...     print(piece, end="", flush=True)
            >>> run.rows[0].text is not None
            True
        """
        if not self._texts:
            fail("tokenizer", "given to the stream for its text", None)
        if not is_integer(row) or not 0 <= row < len(self.rows):
            fail("row", f"in [0, {len(self.rows)})", repr(row))
        return self._pieces(self.rows[row])

    def _pieces(self, row: Row) -> Iterator[str]:
        given = 0
        going = True
        while going:
            going = next(self, None) is not None
            text = row.text or ""
            if given < len(text):
                yield text[given:]
            given = len(text)

    @property
    def decode_mode(self) -> str:
        """How it was decoded so far: names of `decode_modes.DECODE_MODES`."""
        if self._decoder is None:
            return CALLS
        return ", ".join(sorted(set(self._decoder.taken.values()))) or CALLS

    @property
    def speculation(self) -> Counts | None:
        """What the draft came to so far; None without one."""
        return None if self._speculation is None else self._speculation.counts

    def interrupt(self) -> None:
        """End here, as a KeyboardInterrupt during a step does."""
        self.interrupted = True
        self._end("interrupted")

    @torch.inference_mode()
    def _step(self) -> list[int | None]:
        session = self.session
        going = [b for b, row in enumerate(self.rows) if not row.finish_reason]
        chosen = self._choices(going)
        check_choices(chosen, going)
        given: list[int | None] = list(chosen)
        for b, (row, token) in enumerate(zip(self.rows, chosen, strict=True)):
            if self._speculation is None:
                # A row that has ended runs along, so that rows of equal length stay so.
                session.ids[b].append(max(token, 0))
            if row.finish_reason:
                given[b] = None
            elif token in self.stops:
                self._finish(b, "stop", token)
                given[b] = None
            else:
                self._take(b, token)
        self.steps_left -= 1
        if not self.steps_left or all(row.finish_reason for row in self.rows):
            self._end("length")
        return given

    def _take(self, b: int, token: int) -> None:
        """A token of a row that goes on; its text may end it."""
        row = self.rows[b]
        row.tokens.append(token)
        if self._texts:
            stop = self._texts[b].add(token)
            row.text = self._texts[b].text
            if stop is not None:
                row.finish_reason, row.stopped_by = "stop", stop

    def _finish(self, b: int, reason: str, stopped_by: int | None = None) -> None:
        """The end of a row that goes on."""
        row = self.rows[b]
        row.finish_reason, row.stopped_by = reason, stopped_by
        if self._texts:
            self._texts[b].end()
            row.text = self._texts[b].text

    def _choices(self, going: list[int]) -> list[int]:
        """The next token of each row, -1 if its logits were NaN. going: rows that go on."""
        if self._speculation is not None:
            return self._speculation.next_tokens(going)
        if self._decoder is not None:
            return self._decoder.next_tokens()
        session = self.session
        if self._last is not None:
            logits = next_logits(session.model, self._last, session.cache)
        else:
            new = sum(self._prompts) - sum(self.reused)
            start = time.perf_counter()
            logits = session.prefill(self.chunk)
            if drafting := session.drafting():
                self._speculation = Speculation(
                    session.model, session.cache, session.ids, *drafting, self.sampler,
                    logits=logits, steps=self.steps_left, stops=self.stops,
                    reading=(time.perf_counter() - start) / new,
                )  # fmt: skip
                return self._speculation.next_tokens(going)
            if decoder := session.decoder():
                decoder.begin(logits, self.sampler, self.steps_left)
                self._decoder = decoder
                return decoder.next_tokens()
        chosen = self.sampler(logits)
        self._last = chosen.clamp(min=0)  # a row that has ended runs along with any token
        return chosen.tolist()

    def _end(self, reason: str) -> None:
        self.steps_left = 0
        for b, row in enumerate(self.rows):
            if not row.finish_reason:
                self._finish(b, reason)
        # What a row ran along after its end is no part of it.
        real = [n + len(row.tokens) for n, row in zip(self._prompts, self.rows, strict=True)]
        cache = self.session.cache
        cache.truncate([min(pair) for pair in zip(cache.rows, real, strict=True)])
