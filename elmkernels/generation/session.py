"""Generating tokens: `generate` gives results, `stream` tokens as they come.

A prompt goes through the model in chunks, so that its activations never take more memory than a
chunk's, then every step decodes one token a row: by `step.next_logits`, or on a GPU by a
`Decoder`, which doesn't wait for it. Rows may have prompts of different lengths: the cache holds
each at its own positions.

A `Session` keeps its cache: a prompt that begins like what a row holds pays for the rest alone.
An interruption (Ctrl-C) ends a stream, and nothing is lost: `Stream.rows` has what was
generated, and the session goes on from there.

With a tokenizer prompts may be texts, rows have a text, and a text may end them (see `text`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..acceleration.decode_modes import CALLS, wanted
from ..checks import fail
from ..openelm.model import OpenELM
from ..openelm.tokenizer import Tokenizer
from .drafts import Draft, check_draft, made_draft
from .gpu_decoder import Decoder
from .pace import Pace
from .prompts import Prompts, check_lengths, check_tokenizer, prompt_ids
from .row import Row
from .step import new_cache, prefill
from .streaming import CHUNK, Stream


class Session:
    """Generations that share one cache: of a prompt only what a row doesn't hold yet is read.

    The cache belongs to the weights that filled it: `reset()` if they change. On a GPU keep one
    session for many generations: it captures the graphs of a step once.

    Args:
        model: the model, accelerated or not.
        batch: rows that are generated together.
        max_length: the most tokens a row can hold; None for the model's rope_max_length.
        decode_mode: how a GPU decodes a token: "one-launch" (one kernel runs all layers), "graph"
            (the model's kernels, replayed as a CUDA graph) or "calls" (the model is called); None
            for the fastest that is possible. A CPU has "calls" alone.
        draft, draft_tokens: see `generate`; with a draft the mode is "calls".

    Raises:
        TypeError, ValueError: batch, max_length, decode_mode, draft or draft_tokens is out of its
            range.
        MemoryError: the cache doesn't fit.
        RuntimeError: the model can't be decoded in the named mode here, with the reason.

    Example:
        >>> session = Session(model)
        >>> (row,) = session.generate([[1, 2, 3]], 20)
        >>> (row,) = session.generate([[1, 2, 3, *row.tokens, 4]], 20)  # 4 is new
    """

    def __init__(
        self,
        model: OpenELM,
        batch: int = 1,
        max_length: int | None = None,
        *,
        decode_mode: str | None = None,
        draft: str | OpenELM | None = None,
        draft_tokens: int | None = None,
    ) -> None:
        length = model.config.rope_max_length if max_length is None else max_length
        check_draft(draft, draft_tokens, model, length)
        if draft is not None:
            if decode_mode not in (None, CALLS):
                fail("decode_mode", f"None or {CALLS!r} with a draft", repr(decode_mode))
            decode_mode = CALLS
        self.model, self.decode_mode = model, decode_mode
        self._wanted = draft, draft_tokens
        self._drafting: tuple[Draft, Pace] | None = None
        self.cache = new_cache(model, batch, max_length)
        self._dtype = model.activation_dtype
        # Always at least what the cache holds: ids are added before they are written, so that no
        # interruption leaves a token in the cache whose id isn't here.
        self.ids: list[list[int]] = [[] for _ in range(self.cache.batch)]
        self.current: Stream | None = None
        self._decoder: Decoder | None = None
        if decode_mode not in (None, CALLS):
            self._decoder = Decoder(model, self.cache, decode_mode)

    def decoder(self) -> Decoder | None:
        """What decodes without waiting for the device, for the model as it is now.

        Returns:
            The decoder; None if the model is called for every token.
        """
        if self.decode_mode == CALLS:
            return None
        if self.decode_mode is None and not wanted(self.model, self.cache):
            return None
        if self._decoder is None:
            self._decoder = Decoder(self.model, self.cache)
        return self._decoder

    def drafting(self) -> tuple[Draft, Pace] | None:
        """What guesses tokens for its rows and how many are asked for, made at the first call.

        Returns:
            Both, or None without a draft.
        """
        draft, tokens = self._wanted
        if self._drafting is None and draft is not None:
            cache = self.cache
            made = made_draft(draft, self.model, cache.batch, cache.max_length, CHUNK)
            self._drafting = made, Pace(tokens)
        return self._drafting

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the cache (see `KVCache.nbytes`) and of what was captured, on a GPU."""
        graphs = 0 if self._decoder is None else self._decoder.nbytes
        return {"cache": self.cache.nbytes, "graphs": graphs}

    def reset(self) -> None:
        """Forget everything; a stream that has not ended can't go on."""
        self.current = self._drafting = None
        self.cache.reset()
        self.ids = [[] for _ in self.ids]

    def generate(self, prompts: Prompts, max_new_tokens: int, **options: Any) -> list[Row]:
        """As the function `generate`; the prompts may begin with what the rows hold.

        Args:
            prompts, max_new_tokens, options: as `generate` takes them.

        Returns:
            A Row for each prompt.
        """
        stream = self.stream(prompts, max_new_tokens, **options)
        for _ in stream:
            pass
        return stream.rows

    def stream(self, prompts: Prompts, max_new_tokens: int, **options: Any) -> "Stream":
        """As the function `stream`; a stream that has not ended can't go on after this.

        Args:
            prompts, max_new_tokens, options: as `generate` takes them.

        Returns:
            The Stream.
        """
        self.current = Stream(self, prompts, max_new_tokens, **options)
        return self.current

    def begin(self, prompts: Sequence[list[int]]) -> list[int]:
        """Go back to the longest common prefix of each row with its prompt, less one token if it
        is the whole prompt, as logits come from passes alone.

        Args:
            prompts: the ids of each row.

        Returns:
            How many tokens of each were kept.
        """
        if (dtype := self.model.activation_dtype) != self._dtype:  # autocast began or ended
            self.cache.reset()
        self._dtype = dtype
        kept = []
        for held, ids, prompt in zip(self.cache.rows, self.ids, prompts, strict=True):
            most = min(held, len(prompt) - 1)
            kept.append(next((i for i in range(most) if ids[i] != prompt[i]), most))
        self.cache.truncate(kept)
        self.ids = [list(prompt) for prompt in prompts]
        return kept

    @torch.inference_mode()
    def prefill(self, chunk: int) -> Tensor:
        """Run the ids that the cache doesn't hold, at least one a row.

        Args:
            chunk: how many at a time.

        Returns:
            The logits after each row's last, [batch, vocab_size].
        """
        return prefill(self.model, self.ids, self.cache, chunk, self.decoder())


def stream(
    model: OpenELM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    decode_mode: str | None = None,
    draft: str | OpenELM | None = None,
    draft_tokens: int | None = None,
    **options: Any,
) -> Stream:
    """`generate` step by step.

    Args:
        model, prompts, max_new_tokens, decode_mode, draft, draft_tokens: as `generate` takes them.
        options: the other arguments of `generate`.

    Returns:
        A Stream: an iterator of list[int | None], a token for each row that goes on. Its `rows` are
        what `generate` returns, its `text()` is an iterator of a row's text.

    Raises:
        TypeError, ValueError: as `generate` does.

    Example:
        >>> for (token,) in stream(model, [[1, 2, 3]], 20):
        ...     print(token)
    """
    tokenizer = options.get("tokenizer")
    check_tokenizer(tokenizer)
    ids = prompt_ids(prompts, model.config, tokenizer)
    limit = model.config.rope_max_length
    steps = check_lengths(ids, max_new_tokens, limit, "rope_max_length")
    room = min(limit, max(map(len, ids)) + steps)
    session = Session(
        model, len(ids), room, decode_mode=decode_mode, draft=draft, draft_tokens=draft_tokens
    )
    return session.stream(ids, max_new_tokens, **options)


def generate(
    model: OpenELM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_tokens: int | Iterable[int] | None = None,
    stop_strings: str | Iterable[str] = (),
    tokenizer: Tokenizer | None = None,
    chunk: int = CHUNK,
    decode_mode: str | None = None,
    draft: str | OpenELM | None = None,
    draft_tokens: int | None = None,
) -> list[Row]:
    """Tokens after each of some prompts. An interruption (Ctrl-C) returns what there is by then.

    Args:
        model: the model, accelerated or not.
        prompts: integers [batch, length], or a list of lists of ids, which may differ in length
            (none empty); with a tokenizer also of texts.
        max_new_tokens: the most tokens after each prompt.
        temperature: what the logits are divided by; 0 takes the most likely token, as does one
            below float32's normal numbers.
        top_k: draw from the k most likely tokens; None for all, as at temperature 0.
        top_p: draw from the most likely tokens that together have this probability; None likewise.
        repetition_penalty: what the logits of tokens that a row holds are divided by.
        seed: of what is drawn: row b draws from seed + b (or seed[b]), whatever the rows beside it.
        stop_tokens: ids that end a row; they are not among its tokens. None: those that the
            checkpoint says (`OpenELMConfig.eos_token_ids`); () for none.
        stop_strings: texts that end a row, wherever they begin and end in tokens; they are not part
            of its text.
        tokenizer: what makes rows have a text (`Tokenizer.from_pretrained`).
        chunk: tokens of a prompt that go through the model in one pass.
        decode_mode: see `Session`.
        draft: what guesses tokens, of which the model checks several in one pass: "lookup" (what
            followed before in the row), "self" (a 4-bit copy of the model, 0.28 of its bfloat16
            bytes more) or a model of the same vocabulary. Text and seeds stay the same.
        draft_tokens: always guess so many; None for as many as pay by the times and the acceptance
            that are measured on the way, none if none do.

    Returns:
        A Row for each prompt: its tokens, its text with a tokenizer, and why it ended.

    Raises:
        TypeError, ValueError: before anything is run, for arguments out of their range and for
            prompts that don't fit rope_max_length with what is to follow; ValueError for logits
            that are NaN.

    Example:
        >>> (row,) = elmkernels.generate(model, [[1, 2, 3]], 20, temperature=0.8, seed=0)
        >>> row.tokens, row.finish_reason
    """
    run = stream(
        model, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        repetition_penalty=repetition_penalty, seed=seed, stop_tokens=stop_tokens,
        stop_strings=stop_strings, tokenizer=tokenizer, chunk=chunk, decode_mode=decode_mode,
        draft=draft, draft_tokens=draft_tokens,
    )  # fmt: skip
    for _ in run:
        pass
    return run.rows
