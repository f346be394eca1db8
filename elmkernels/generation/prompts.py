"""What a generation is given, checked before anything is run."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from .sampling import is_integer

Prompts = Tensor | Sequence[Sequence[int] | Tensor]


def prompt_ids(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """Prompts as lists of ids of the vocabulary, none empty. Raises TypeError or ValueError."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point() or prompts.is_complex():
            raise ValueError(
                "prompts must be integers [batch, length] or a list of lists of ids, "
                f"got {prompts.dtype} {list(prompts.shape)}"
            )
        rows = prompts.tolist()
    elif isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes):
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    else:
        raise TypeError(f"prompts must be a tensor or a list, got {type(prompts).__name__}")
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    for b, row in enumerate(rows):
        if not isinstance(row, list | tuple) or not all(map(is_integer, row)):
            raise TypeError(f"prompts[{b}] must be a list of ids, got {_short(row)}")
        if not row:
            raise ValueError(f"prompts[{b}] must hold at least one token, got an empty prompt")
        if min(row) < 0 or max(row) >= vocab_size:
            wrong = next(token for token in row if not 0 <= token < vocab_size)
            raise ValueError(f"prompts[{b}] must hold ids in [0, {vocab_size}), got {wrong}")
    return [list(row) for row in rows]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_lengths(ids: list[list[int]], max_new_tokens: int, limit: int, what: str) -> None:
    """Raise ValueError if a prompt and what is to follow don't fit `limit` tokens."""
    if not is_integer(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens!r}")
    for b, prompt in enumerate(ids):
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompts[{b}] and max_new_tokens must fit {limit} tokens ({what}) together, "
                f"got {len(prompt)} + {max_new_tokens}"
            )


def stop_set(stop_tokens: int | Iterable[int], vocab_size: int) -> frozenset[int]:
    """Tokens of the vocabulary that end a row."""
    stops = [stop_tokens] if is_integer(stop_tokens) else list(stop_tokens)
    for token in stops:
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(f"stop_tokens must lie in [0, {vocab_size}), got {token!r}")
    return frozenset(stops)
