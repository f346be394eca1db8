"""What a generation gives for one prompt."""

from dataclasses import dataclass, field


@dataclass
class Row:
    """What one row generated, and why it ended.

    Attributes:
        tokens: the ids, without a stop token; those that a stop string is made of are among them.
        finish_reason: "length" (max_new_tokens), "stop" (a stop token or string), "interrupted" or
            "failed"; "" while it goes on.
        stopped_by: the stop token or the stop string, if one ended it.
        text: what the tokens add to the prompt, up to a stop string; while the row goes on, as much
            of it as no token can change any more. None without a tokenizer.

    Example:
        >>> Row([5, 7], "stop", 2).tokens
        [5, 7]
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stopped_by: int | str | None = None
    text: str | None = None
