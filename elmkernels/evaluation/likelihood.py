"""Log-likelihoods of tokens, as few passes as that takes.

    score = sum of log_softmax(logits)[id] over the tokens that are asked for, in float32

A unit (see `sharing`) is two passes: the branches as rows of one cache, then their leaves as rows
that each begin with a copy of their branch's keys and values. Only positions whose next token is
asked for go through the head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import fail, integer
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from .sharing import Ids, Leaf, Request, Unit, plan

# Tokens of a unit by the kind of device, and of one pass over leaves: what a product needs to be
# as fast as it gets, and no more, as padding and memory grow with it.
BUDGET = {"cpu": 2048, "cuda": 32768}
LEAVES = {"cpu": 512, "cuda": 32768}
_ROWS = 256  # positions that go through the head at once


class Score(NamedTuple):
    """What a request gave.

    Attributes:
        logprob: the natural logarithm of the tokens' probability, given those before.
        greedy: whether each of them is the likeliest at its place.

    Example:
        >>> Score(-1.5, greedy=True).logprob
        -1.5
    """

    logprob: float
    greedy: bool


class _Asked(NamedTuple):
    """A token that is asked for: of which request, which it is, and the row of the states (of all
    rows one after another) that predicts it.
    """

    request: int
    token: int
    row: int


class Scorer:
    """Scores of a model's units; a stem is computed once for the units that follow each other.

    Args:
        model: the model, accelerated or not, in evaluation mode.
        requests: what the units of `plan` are of.

    Example:
        >>> scorer = Scorer(model, requests)
        >>> for unit in plan(requests, 2048):
        ...     scores = scorer(unit)
    """

    def __init__(self, model: OpenELM, requests: Sequence[Request]) -> None:
        self.model, self.requests = model, requests
        self.device = model.norm.weight.device
        self._stem: tuple[Ids, KVCache | None] = ((), None)

    @torch.inference_mode()
    def __call__(self, unit: Unit) -> list[Score]:
        """The scores of `unit.requests`, in their order."""
        order = unit.requests
        sums = torch.zeros(len(order), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(order), dtype=torch.bool, device=self.device)
        slots = {request: i for i, request in enumerate(order)}
        stem = self._stem_of(unit.stem)
        cache, states = self._branches(stem, unit)
        width, asked = states.shape[1], []
        for b, branch in enumerate(unit.branches):
            for leaf in branch.leaves:
                begin = len(unit.stem)
                asked += self._asked(leaf, begin, len(branch.tokens), b * width)
        self._add(states, asked, slots, sums, greedy)
        rows = [(b, leaf) for b, branch in enumerate(unit.branches) for leaf in branch.leaves]
        rows = [row for row in rows if row[1].tokens]
        held = [len(unit.stem) + len(branch.tokens) for branch in unit.branches]
        most = LEAVES.get(self.device.type, LEAVES["cpu"])
        for part in _even(rows, held, most, self.model.config.rope_max_length):
            states = self._leaves(cache, part)
            width, asked = states.shape[1], []
            for i, (b, leaf) in enumerate(part):
                begin = len(unit.stem) + len(unit.branches[b].tokens)
                asked += self._asked(leaf, begin, len(leaf.tokens), i * width)
            self._add(states, asked, slots, sums, greedy)
        return [Score(*pair) for pair in zip(sums.tolist(), greedy.tolist(), strict=True)]

    def _asked(self, leaf: Leaf, begin: int, length: int, row: int) -> Iterator[_Asked]:
        """What is asked for of a leaf's requests at the positions [begin, begin + length)."""
        for r in leaf.requests:
            ids, start = self.requests[r]
            for position in range(max(begin, start - 1), min(begin + length, len(ids) - 1)):
                yield _Asked(r, ids[position + 1], row + position - begin)

    def _stem_of(self, tokens: Ids) -> KVCache | None:
        if self._stem[0] != tokens:
            self._stem = ((), None)  # before the next one takes its memory
            cache = None
            if tokens:
                cache = self._cache(1, len(tokens))
                self.model.hidden_states(self._rows([tokens]), cache=cache, logits_to_keep=1)
            self._stem = (tokens, cache)
        return self._stem[1]

    def _branches(self, stem: KVCache | None, unit: Unit) -> tuple[KVCache | None, Tensor]:
        """A cache of the branches and their states; no cache if nothing follows them."""
        tokens = [branch.tokens for branch in unit.branches]
        counts = [len(row) for row in tokens]
        if stem is None and not any(branch.rest for branch in unit.branches):
            return None, self.model.hidden_states(self._rows(tokens))
        cache = self._cache(len(tokens), len(unit.stem) + max(counts))
        if stem is not None:
            _copy(stem, [0] * len(tokens), cache)
        return cache, self.model.hidden_states(self._rows(tokens), cache=cache, counts=counts)

    def _leaves(self, branches: KVCache | None, part: list[tuple[int, Leaf]]) -> Tensor:
        if branches is None:
            raise RuntimeError("leaves follow branches that were not kept")
        tokens = [leaf.tokens for _, leaf in part]
        counts = [len(row) for row in tokens]
        origins = [b for b, _ in part]
        held = branches.rows
        cache = self._cache(len(part), max(held[b] for b in origins) + max(counts))
        _copy(branches, origins, cache)
        return self.model.hidden_states(self._rows(tokens), cache=cache, counts=counts)

    def _cache(self, batch: int, length: int) -> KVCache:
        model = self.model
        return KVCache(
            model.config, batch, length, dtype=model.activation_dtype, device=self.device
        )

    def _rows(self, tokens: Sequence[Ids]) -> Tensor:
        width = max(map(len, tokens))
        padded = [(*row, *(0,) * (width - len(row))) for row in tokens]
        return torch.tensor(padded, dtype=torch.int64, device=self.device)

    def _add(
        self,
        states: Tensor,
        asked: list[_Asked],
        slots: dict[int, int],
        sums: Tensor,
        greedy: Tensor,
    ) -> None:
        """Add the logarithms of what is asked for, and take from greedy what isn't likeliest."""
        asked.sort(key=lambda one: one.row)
        states = states.flatten(0, 1)
        rows = sorted({one.row for one in asked})
        at = {row: i for i, row in enumerate(rows)}
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS]
            logits = self.model.project(states[torch.tensor(part, device=self.device)]).float()
            total, likeliest = logits.logsumexp(-1), logits.argmax(-1)
            now = [one for one in asked if begin <= at[one.row] < begin + len(part)]
            index = torch.tensor([at[one.row] - begin for one in now], device=self.device)
            token = torch.tensor([one.token for one in now], device=self.device)
            slot = torch.tensor([slots[one.request] for one in now], device=self.device)
            sums.index_add_(0, slot, (logits[index, token] - total[index]).double())
            greedy[slot[likeliest[index] != token]] = False


def _copy(source: KVCache, rows: list[int], target: KVCache) -> None:
    """Fill an empty cache: row i with what row rows[i] of another holds."""
    held = [source.rows[row] for row in rows]
    longest, index = max(held), torch.tensor(rows, device=source.device)
    for name in ("k", "v"):
        for old, new in zip(getattr(source, name), getattr(target, name), strict=True):
            new[:, :longest] = old[:, :longest].index_select(0, index)
    target.advance(held)


def _even(
    rows: list[tuple[int, Leaf]], held: list[int], most: int, limit: int
) -> Iterator[list[tuple[int, Leaf]]]:
    """Leaves of about one length each, at most so many tokens together, padding included.

    Args:
        rows: leaves, each with the index of its branch.
        held: the tokens up to the end of each branch.
        most: tokens of a part.
        limit: of a cache's rows, which have all one length.
    """
    part: list[tuple[int, Leaf]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -len(row[1].tokens)):
        width = len((part or [row])[0][1].tokens)
        longest = max(longest, held[row[0]])
        if part and (width * (len(part) + 1) > most or longest + width > limit):
            yield part
            part, longest = [], held[row[0]]
        part.append(row)
    if part:
        yield part


def budget_of(device: torch.device) -> int:
    """The tokens of a unit on a device."""
    return BUDGET.get(device.type, BUDGET["cpu"])


def check_request(name: str, request: Request, vocab_size: int, most: int) -> None:
    """Raise ValueError unless a model can score a request.

    Args:
        name: of the argument.
        request: what is asked for.
        vocab_size: how many ids the model has.
        most: the tokens that it can read.
    """
    ids, start = request
    if not 1 <= start <= len(ids):
        fail(f"{name}.start", f"in [1, {len(ids)}], the number of ids", start)
    if len(ids) > most + 1:
        fail(f"{name}.ids", f"at most {most + 1} (the positions, and one more)", len(ids))
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        fail(f"{name}.ids", f"in [0, {vocab_size})", wrong)


def log_likelihoods(
    model: OpenELM,
    requests: Sequence[Request],
    *,
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """How likely tokens are after others. Beginnings that requests share are computed once.

    Args:
        model: the model, accelerated or not.
        requests: what is asked for; none may be longer than rope_max_length + 1.
        budget: tokens that are computed together; None for what suits the device.
        progress: called before each unit with how many are done, and how many there are.

    Returns:
        A Score for each request.

    Raises:
        ValueError: a request has no token before what is asked for, is too long, or has ids that
            the model doesn't have.

    Example:
        >>> (score,) = log_likelihoods(model, [Request((1, 5, 7), start=1)])
        >>> score.logprob < 0
        True
    """
    config = model.config
    for i, request in enumerate(requests):
        check_request(f"requests[{i}]", request, config.vocab_size, config.rope_max_length)
    device = model.norm.weight.device
    budget = budget_of(device) if budget is None else integer("budget", budget, 1)
    scorer, scores = Scorer(model, requests), [Score(0.0, True)] * len(requests)
    units = plan(requests, budget)
    for done, unit in enumerate(units):
        if progress is not None:
            progress(done, len(units))
        for request, score in zip(unit.requests, scorer(unit), strict=True):
            scores[request] = score
    return scores
