"""How many tokens are guessed: on costs of a made-up machine, which a clock of its own tells."""

import pytest
import torch

from elmkernels.generation.pace import Pace


class Clock:
    """Costs of a machine: what a Pace is told."""

    def __init__(self, draft: float, more: float, accepted) -> None:
        self.draft, self.more, self.accepted = draft, more, accepted

    def run(self, tokens: int, fixed: int | None = None) -> tuple[float, float]:
        """Seconds with the pace and without, of about so many tokens of one row."""
        pace, made, spent = Pace(fixed), 0, 0.0
        pace.begin(tokens, 0.001)
        draft = ModelDraftLike()
        while made < tokens:
            seconds, n = 1.0, 0
            if pace.wants(draft, [[0] * (made + 4)], [0]):
                n = pace.guesses(0, 0)
            kept = 0
            while kept < n and self.accepted(made + kept):
                kept += 1
            cost = self.draft * n
            seconds += self.more * n
            if n:
                pace.checked({0: (n, kept)}, seconds, cost)
            else:
                pace.passed(1, seconds, 0.0)
            spent += seconds + cost
            made += kept + 1
        return spent, float(made)


class ModelDraftLike:
    whole = True

    def missed(self, ids, rows) -> int:
        return 0


@pytest.mark.parametrize("costs", [(0.4, 0.05), (0.0, 0.05), (0.9, 0.5), (0.1, 1.0), (3.0, 0.1)])
def test_the_pace_loses_little_on_what_cannot_be_guessed(costs):
    for tokens, bound in ((128, 0.97), (1000, 0.98)):
        spent, plain = Clock(*costs, lambda at: False).run(tokens)
        assert plain / spent >= bound
    assert Clock(*costs, lambda at: False).run(128, fixed=4)[0] > 128 * 1.1, "it can fail"


def test_the_pace_takes_what_pays():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(5000, generator=generator).tolist()
    spent, plain = Clock(0.3, 0.05, lambda at: draws[at] < 0.9).run(1000)
    assert plain / spent > 1.5
    spent, plain = Clock(0.0, 0.05, lambda at: True).run(1000)
    assert plain / spent > 4
    # It finds text again that can be guessed, after some that can't.
    spent, plain = Clock(0.0, 0.05, lambda at: at > 600).run(2000)
    assert plain / spent > 2


def test_a_kind_that_does_not_pay_is_left_out_beside_one_that_does():
    """Tried again now and then, and taken up at once when its guesses are kept."""

    def tried(pace: Pace, kept: bool, rounds: int) -> int:
        count = 0
        for i in range(rounds):
            kind = 1 + i % 2  # 1 is kept, 2 as this says
            wanted = pace.wants(ModelDraftLike(), [[0] * 9], [0])  # or a plain pass is measured
            n = pace.guesses(kind, 0) if wanted else 0
            assert n or kind == 2 or not wanted
            if n:
                count += kind == 2
                pace.checked({0: (n, n if kind == 1 or kept else 0)}, 1.0 + 0.3 * n, 0.0)
            else:
                pace.passed(1, 1.0, 0.0)
        return count

    pace = Pace(None)
    pace.begin(1000, 0.001)
    for _ in range(3):
        pace.passed(1, 1.0, 0.0)
    early = tried(pace, False, 40)
    late = tried(pace, False, 260)
    assert early >= 4 and 5 <= late <= 20, (early, late)
    assert tried(pace, True, 200) >= 60
