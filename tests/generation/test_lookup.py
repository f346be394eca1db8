"""What `draft="lookup"` guesses: what followed before, and where a copy was left."""

import pytest

from elmkernels.generation.drafts import Lookup


def test_lookup_finds_the_longest_match():
    lookup = Lookup(2)
    ids = [[1, 2, 3, 9, 7, 2, 3, 8, 5, 1, 2, 3], [1, 2, 1, 2]]
    found = lookup.propose(ids, [0, 1], lambda kind, row: 4, None)
    assert found == [[9, 7, 2, 3], [1, 2, 1, 2]]
    assert lookup.propose([[4, 5, 6], [1]], [0, 1], lambda *_: 4, None) == [[], []]


@pytest.mark.parametrize("written", [[50], [50, 51], []], ids=["replaced", "longer", "left out"])
def test_lookup_goes_on_after_what_was_edited(written):
    """A copy of 20 tokens, one of which becomes others; the token after it is found again, though
    it stands elsewhere too, later.
    """
    shown = [*range(1, 9), 30, *range(9, 20)]
    lookup = Lookup(1)
    ids = [*shown, 40, 9, 41, *shown[:8]]
    asked: list[int] = []

    def ask(kind: int, row: int) -> int:
        asked.append(kind)
        return 3

    assert lookup.propose([ids], [0], ask, None) == [[30, 9, 10]]
    ids += written
    for end in range(1, len(written) + 1):
        row = ids[: len(ids) - len(written) + end]
        assert lookup.propose([row], [0], ask, None) == [[]], "a new word is nowhere"
    ids.append(9)
    assert lookup.propose([ids], [0], ask, None) == [[10, 11, 12]] and asked == [8, 1]
    ids += [10, 11, 12, 13]
    assert lookup.propose([ids], [0], ask, None) == [[14, 15, 16]] and asked[-1] >= 4
    # Without a copy that was followed, one token says nothing.
    assert Lookup(1).propose([[9, 10, 11, 9]], [0], ask, None) == [[]]
