"""What a generation is given, checked before anything is run."""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import numpy as np
from torch import Tensor

from ..checks import fail, integer, is_integer
from ..openelm.config import OpenELMConfig
from ..openelm.tokenizer import Tokenizer

Prompts = Tensor | np.ndarray | Sequence["Sequence[int] | Tensor | np.ndarray | str"]


def check_tokenizer(tokenizer: object) -> None:
    """Raise TypeError unless it is a Tokenizer or None."""
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        fail("tokenizer", "an openelm.Tokenizer or None", type(tokenizer).__name__, TypeError)


def prompt_ids(
    prompts: Prompts, config: OpenELMConfig, tokenizer: Tokenizer | None = None
) -> list[list[int]]:
    """Prompts as lists of ids of the vocabulary, none empty; texts by the tokenizer. Raises
    TypeError or ValueError.
    """
    if isinstance(prompts, Tensor | np.ndarray):
        rows = _array(prompts)
    elif isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes):
        rows = list(prompts)
    else:
        fail("prompts", "a tensor or a list", type(prompts).__name__, TypeError)
    if not rows:
        fail("prompts", "at least one prompt", "none")
    return [_row(f"prompts[{b}]", row, config.vocab_size, tokenizer) for b, row in enumerate(rows)]


def _array(prompts: Tensor | np.ndarray) -> list[Any]:
    if isinstance(prompts, Tensor):
        integers = not (prompts.is_floating_point() or prompts.is_complex())
    else:
        integers = prompts.dtype.kind in "iu"
    if prompts.ndim != 2 or not integers:
        got = f"{prompts.dtype} {list(prompts.shape)}"
        fail("prompts", "integers [batch, length] or a list of lists of ids", got)
    return prompts.tolist()


def _row(name: str, row: Any, vocab_size: int, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            fail("tokenizer", f"given for a prompt of text ({name})", None)
        row = tokenizer.encode(row)
    elif isinstance(row, Tensor | np.ndarray):
        row = row.tolist()
    if not isinstance(row, list | tuple) or not all(map(is_integer, row)):
        fail(name, "a list of ids", _short(row), TypeError)
    if not row:
        raise ValueError(f"{name} must hold at least one token, got an empty prompt")
    if min(row) < 0 or max(row) >= vocab_size:
        wrong = next(token for token in row if not 0 <= token < vocab_size)
        raise ValueError(f"{name} must hold ids in [0, {vocab_size}), got {wrong}")
    return [int(token) for token in row]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_lengths(ids: list[list[int]], max_new_tokens: int, limit: int, what: str) -> int:
    """max_new_tokens as Python's int. Raises ValueError if a prompt and what is to follow don't fit
    `limit` tokens.
    """
    count = integer("max_new_tokens", max_new_tokens, 0)
    for b, prompt in enumerate(ids):
        if len(prompt) + count > limit:
            raise ValueError(
                f"prompts[{b}] and max_new_tokens must fit {limit} tokens ({what}) together, "
                f"got {len(prompt)} + {count}"
            )
    return count


def stop_set(stop_tokens: int | Iterable[int] | None, config: OpenELMConfig) -> frozenset[int]:
    """Tokens of the vocabulary that end a row; None: the checkpoint's own, if they are of it."""
    size = config.vocab_size
    if stop_tokens is None:
        return frozenset(token for token in config.eos_token_ids if token < size)
    array = isinstance(stop_tokens, Tensor | np.ndarray)
    found: Any = stop_tokens.tolist() if array else stop_tokens
    if isinstance(found, str | bytes) or not (is_integer(found) or isinstance(found, Iterable)):
        _wrong_stops(size, found, TypeError)
    stops = [found] if is_integer(found) else list(cast(Iterable, found))
    for token in stops:
        if not is_integer(token) or not 0 <= token < size:
            _wrong_stops(size, token)
    return frozenset(int(token) for token in stops)


def _wrong_stops(vocab_size: int, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"stop_tokens must lie in [0, {vocab_size}), got {got!r}")


def stop_texts(stop_strings: str | Iterable[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Strings that end a row, none empty. Raises TypeError or ValueError."""
    if isinstance(stop_strings, str):
        stop_strings = [stop_strings]
    elif not isinstance(stop_strings, Iterable):
        fail("stop_strings", "text or a list of texts", repr(stop_strings), TypeError)
    found = tuple(stop_strings)
    for text in found:
        if not isinstance(text, str):
            fail("stop_strings", "text or a list of texts", _short(found), TypeError)
        if not text:
            fail("stop_strings", "of at least one character each", repr(text))
    if found and tokenizer is None:
        fail("tokenizer", "given with stop_strings", None)
    return found
