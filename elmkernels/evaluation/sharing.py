"""Which requests share a beginning, and which are computed together.

The choices of a question begin alike, and the questions of a task may all begin with the same
examples. Of many sequences each is computed as at most three parts, and each part once for all that
begin with it: a stem, a branch, and a leaf.

What is computed together follows from the requests alone, not from what is done already: a run that
goes on later gives the bits that it would have given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Ids = tuple[int, ...]

# A beginning is shared if that leaves each sequence so many tokens fewer to compute: choices are
# computed together anyway, a stem is a pass of its own.
BRANCH_GAIN, STEM_GAIN = 4, 32
# Sequences that may share a branch: what more of them share is the examples before a question, not
# the question, and a stem's.
BRANCH_MOST = 12


class Request(NamedTuple):
    """Tokens whose probability is asked for.

    Attributes:
        ids: all tokens, the ones before among them.
        start: the first that is asked for, at least 1: what is before it is given.

    Example:
        >>> Request((1, 5, 7), start=2).ids[2:]
        (7,)
    """

    ids: Ids
    start: int


class Leaf(NamedTuple):
    """What follows a branch, and the requests that it is the end of."""

    tokens: Ids
    requests: tuple[int, ...]


@dataclass
class Branch:
    """What follows a stem, and its ends."""

    tokens: Ids
    leaves: list[Leaf] = field(default_factory=list)

    @property
    def rest(self) -> int:
        """Tokens of all its leaves."""
        return sum(len(leaf.tokens) for leaf in self.leaves)


@dataclass
class Unit:
    """What is computed together: branches of one stem."""

    stem: Ids
    branches: list[Branch]

    @property
    def requests(self) -> list[int]:
        """The requests whose scores it gives, in the order in which it gives them."""
        return [r for branch in self.branches for leaf in branch.leaves for r in leaf.requests]


def plan(requests: Sequence[Request], budget: int) -> list[Unit]:
    """How requests are computed.

    Args:
        requests: in any order.
        budget: tokens of a unit, padding included; one branch may have more.

    Returns:
        Units that have each request once.
    """
    ends: dict[Ids, list[int]] = {}
    for i, (ids, _) in enumerate(requests):
        ends.setdefault(ids[:-1], []).append(i)  # the last token is predicted, never read
    sequences = sorted(ends)
    branches = []
    for group, length in _shared(sequences, BRANCH_GAIN, together=BRANCH_MOST):
        leaves = [Leaf(sequences[i][length:], tuple(ends[sequences[i]])) for i in group]
        branches.append(Branch(sequences[group[0]][:length], leaves))
    branches.sort(key=lambda branch: branch.tokens)
    # Nothing is asked for within a stem, so its states needn't be kept; and something follows it.
    most = [
        min(len(b.tokens), *(requests[r].start for leaf in b.leaves for r in leaf.requests)) - 1
        for b in branches
    ]
    units, alone = [], []
    for group, length in _shared([b.tokens for b in branches], STEM_GAIN, most):
        if len(group) == 1:
            alone.append(branches[group[0]])
            continue
        cut = [Branch(branches[i].tokens[length:], branches[i].leaves) for i in group]
        stem = branches[group[0]].tokens[:length]
        units += [Unit(stem, part) for part in _parts(cut, budget)]
    units += [Unit((), part) for part in _parts(alone, budget)]
    # The longest first: what is too large shows at once, and the estimate is rather too long.
    stems: dict[Ids, int] = {}
    for unit in units:
        longest = max(len(branch.tokens) for branch in unit.branches)
        stems[unit.stem] = max(stems.get(unit.stem, 0), len(unit.stem) + longest)
    return sorted(units, key=lambda unit: (-stems[unit.stem], unit.stem))


def _parts(branches: list[Branch], budget: int) -> Iterator[list[Branch]]:
    """Branches of about one length each, as many as the budget has room for."""
    part: list[Branch] = []
    width = rest = 0
    for branch in sorted(branches, key=lambda b: (-len(b.tokens), b.tokens)):
        longest = max(width, len(branch.tokens))
        if part and longest * (len(part) + 1) + rest + branch.rest > budget:
            yield part
            part, rest, longest = [], 0, len(branch.tokens)
        part.append(branch)
        width, rest = longest, rest + branch.rest
    if part:
        yield part


def _shared(
    sequences: Sequence[Ids],
    least: int,
    most: Sequence[int] | None = None,
    together: int | None = None,
) -> Iterator[tuple[list[int], int]]:
    """Sorted, different sequences in groups that share a beginning.

    Args:
        sequences: the sequences.
        least: the tokens that each must save.
        most: how much of each may be shared; None for all of it.
        together: how many may share a beginning; None for any number.

    Returns:
        For each group the indices, and how many tokens they share; alone, a sequence shares all of
        its own.
    """
    gain, chosen = [0.0] * len(sequences), [(-1, 0)] * len(sequences)
    for first, last, length in _intervals(sequences):
        count = last - first
        if together is not None and count > together:
            continue
        length = length if most is None else min(length, *most[first:last])
        saved = length * (count - 1) / count
        if saved < least:
            continue
        for i in range(first, last):
            if (saved, length) > (gain[i], chosen[i][1]):
                gain[i], chosen[i] = saved, (first, length)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (first, length) in enumerate(chosen):
        groups.setdefault((first, length) if length else (-1 - i, 0), []).append(i)
    for (_, length), group in groups.items():
        yield group, length if len(group) > 1 else len(sequences[group[0]])


def _intervals(sequences: Sequence[Ids]) -> Iterator[tuple[int, int, int]]:
    """Of sorted sequences every largest run [first, last) that shares `length` tokens, of at least
    two sequences and one token.
    """
    open_runs: list[tuple[int, int]] = []  # where each began and what it shares, ever more
    for i in range(1, len(sequences) + 1):
        common = 0 if i == len(sequences) else _common(sequences[i - 1], sequences[i])
        first = i - 1
        while open_runs and open_runs[-1][1] > common:
            first, length = open_runs.pop()
            yield first, i, length
        if common and (not open_runs or open_runs[-1][1] < common):
            open_runs.append((first, common))


def _common(a: Ids, b: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
