"""What a generation gives for one prompt."""

from dataclasses import dataclass, field


@dataclass
class Row:
    """What one row generated, and why it ended.

    Attributes:
        tokens: the ids, without a stop token.
        finish_reason: "length" (max_new_tokens), "stop" (a stop token), "interrupted" or "failed";
            "" while it goes on.
        stopped_by: the stop token, if one ended it.

    Example:
        >>> Row([5, 7], "stop", 2).tokens
        [5, 7]
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stopped_by: int | None = None
