"""Several tokens a step: a draft guesses what follows, one pass of the model checks all of it.

What a row writes is what plain decoding writes, token by token: the model chooses after every guess
as it would have chosen there, by the same random number of the same place, and a guess is kept if
it is that choice. So greedy text is the model's, and drawn text has the model's distribution and is
that of its seed, with any draft, any number of guesses and any rows beside it. (Rejection sampling
keeps the distribution alone: a seed's text would depend on what was guessed, and so on times.) The
draft draws by the same numbers, so that it mostly draws what the model does where the two agree.

Rows that got more tokens than others wait: `next_tokens` gives one of each row.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from .drafts import Draft
from .pace import Pace
from .sampling import Sampler
from .step import MOST_TOKENS, in_one_call, next_logits, several_greedy, several_logits

MOST_GUESSES = MOST_TOKENS - 1  # of a row, if a pass is no single call


@dataclass
class Counts:
    """What a draft came to. passes: of the model, all of them, which gave so many tokens;
    checks: those that had guesses.
    """

    draft: str
    guessed: int = 0
    accepted: int = 0
    passes: int = 0
    checks: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were kept; None if there were none."""
        return self.accepted / self.guessed if self.guessed else None

    def results(self) -> dict[str, Any]:
        """As plain values, with the acceptance and the tokens of a pass."""
        per_pass = self.tokens / self.passes if self.passes else None
        return asdict(self) | {"acceptance": self.acceptance, "tokens_per_pass": per_pass}


class Speculation:
    """The tokens of one generation after its prompts.

    ids: what each row holds and what it got, of the session: always at least what the cache holds.
    logits: after the prompts. steps: tokens of each row. stops: tokens that end one. reading:
    seconds that the model took for a token of the prompts.
    """

    def __init__(
        self,
        model: OpenELM,
        cache: KVCache,
        ids: list[list[int]],
        draft: Draft,
        pace: Pace,
        sampler: Sampler,
        *,
        logits: Tensor,
        steps: int,
        stops: frozenset[int],
        reading: float,
    ) -> None:
        self.model, self.cache, self.ids = model, cache, ids
        self.draft, self.pace, self.sampler = draft, pace, sampler
        self.steps, self.stops = steps, stops
        self.counts = Counts(draft.name)
        self._waiting: list[deque[int]] = [deque() for _ in ids]
        self._made = [0] * len(ids)
        self._ended = [False] * len(ids)
        draft.begin()
        share = 0.0 if draft.model is None else _parameters(draft.model) / _parameters(model)
        pace.begin(steps, reading * share)
        self._in_one_call = in_one_call(model, cache) is not None
        first = sampler.at(logits, [(b, 0) for b in range(len(ids))], [()] * len(ids))
        for b, token in enumerate(first.tolist()):
            self._take(b, [token])
        self.counts.tokens = 0

    def next_tokens(self, going: Sequence[int]) -> list[int]:
        """The next token of each row, -1 if its logits were NaN.

        going: the rows that haven't ended; what the others get means nothing.
        """
        while not all(self._waiting[b] for b in going):
            self._pass([b for b in going if not self._ended[b]])
        return [waiting.popleft() if waiting else 0 for waiting in self._waiting]

    def _take(self, b: int, tokens: list[int], base: int | None = None) -> None:
        """Give a row tokens, none after one that ends it. base: where they begin; None: the end."""
        ids = self.ids[b]
        self._made[b] += len(tokens)
        last = tokens[-1]
        self._ended[b] = last < 0 or last in self.stops or self._made[b] >= self.steps
        real = tokens if last >= 0 else tokens[:-1]
        ids[len(ids) if base is None else base :] = real  # at once: an interruption may come
        self.sampler.hold(b, real)
        self._waiting[b] += tokens
        self.counts.tokens += len(tokens)

    def _pass(self, rows: list[int]) -> None:
        """One pass of the model over each row's last token and what is guessed after it."""
        start = time.perf_counter()
        guesses = self._guesses(rows)
        guessed = time.perf_counter()
        if not any(guesses):
            self._plain(rows)
            self.pace.passed(len(rows), time.perf_counter() - guessed, guessed - start)
            return
        chosen = self._checked(rows, guesses)
        found: dict[int, tuple[int, int]] = {}
        for b, choices in zip(rows, chosen, strict=True):
            found[b] = len(guesses[b]), self._keep(b, guesses[b], choices)
        self.counts.passes += 1
        self.counts.checks += 1
        self.counts.guessed += sum(n for n, _ in found.values())
        self.counts.accepted += sum(kept for _, kept in found.values())
        self.pace.checked(found, time.perf_counter() - guessed, guessed - start)

    def _guesses(self, rows: list[int]) -> list[list[int]]:
        """Of each row of the batch, none if it doesn't pay."""
        cache = self.cache
        widest = min(MOST_GUESSES, cache.max_length - max(cache.rows) - 1)
        room = {b: min(self.steps - self._made[b] - 1, widest) for b in rows}
        if self._in_one_call:
            each, more = divmod(MOST_TOKENS - len(rows), len(rows))
            room = {b: min(n, each + (i < more)) for i, (b, n) in enumerate(room.items())}
        if max(room.values()) < 1 or not self.pace.wants(self.draft, self.ids, rows):
            return [[] for _ in self.ids]

        def ask(kind: int, b: int) -> int:
            return min(room[b], self.pace.guesses(kind, b))

        choose = None if self.sampler.greedy else self._choose
        return self.draft.propose(self.ids, rows, ask, choose)

    def _choose(
        self, logits: Tensor, rows: Sequence[int], guesses: Sequence[Sequence[int]]
    ) -> list[int]:
        choices = [(b, self._made[b] + len(guesses[b])) for b in rows]
        return self.sampler.at(logits, choices, [guesses[b] for b in rows]).tolist()

    def _plain(self, rows: list[int]) -> None:
        """A token of each row."""
        if len(rows) == len(self.ids):
            last = torch.tensor([row[-1] for row in self.ids], device=self.cache.device)
            logits = next_logits(self.model, last, self.cache)
        else:
            tokens = [[row[-1]] if b in rows else [] for b, row in enumerate(self.ids)]
            logits = several_logits(self.model, tokens, self.cache)
        self.counts.passes += 1
        chosen = self._choose(logits, rows, [()] * len(self.ids))
        for b, token in zip(rows, chosen, strict=True):
            self._take(b, [token])

    def _checked(self, rows: list[int], guesses: list[list[int]]) -> list[list[int]]:
        """The model's own choice after each row's last token and after each guess."""
        tokens: list[list[int]] = [[] for _ in self.ids]
        choices, after = [], []
        for b in rows:
            tokens[b] = [self.ids[b][-1], *guesses[b]]
            self.ids[b] += guesses[b]  # before they are written
            for i in range(len(tokens[b])):
                choices.append((b, self._made[b] + i))
                after.append(guesses[b][:i])
        if self.sampler.greedy:
            found = several_greedy(self.model, tokens, self.cache)
        else:
            logits = several_logits(self.model, tokens, self.cache)
            found = self.sampler.at(logits, choices, after)
        chosen = iter(found.tolist())
        return [[next(chosen) for _ in tokens[b]] for b in rows]

    def _keep(self, b: int, guesses: list[int], choices: list[int]) -> int:
        """Take the model's choices up to the first that was guessed otherwise: how many guesses
        were kept.
        """
        kept = 0
        while kept < len(guesses) and guesses[kept] == choices[kept]:
            kept += 1
        tokens = choices[: kept + 1]
        ends = (i for i, token in enumerate(tokens) if token < 0 or token in self.stops)
        tokens = tokens[: next(ends, kept) + 1]
        base = len(self.ids[b]) - len(guesses)
        held = self.cache.rows
        if held[b] > base + len(tokens) - 1:
            held[b] = base + len(tokens) - 1
            self.cache.truncate(held)
        self._take(b, tokens, base)
        return kept


def _parameters(model: Any) -> int:
    return model.config.num_parameters
