"""How many tokens a draft is asked for, from what was measured in this run.

A pass of the model over n tokens takes V(n), k guesses of the draft D(k), and a guess is kept with
the probability a, which is counted for each kind of guess. k guesses after each of r rows give

    r (1 + a + a^2 + ... + a^k) tokens in D(k) + V(r + r k) seconds

and the k that gives most tokens a second is taken, if that is more than plain passes give. What is
not measured yet is taken for as good as the next fewer tokens: so it is tried, one more at a time.

Whatever it believes, guessing may lose little: the seconds that it took beside those that its
tokens would have taken are counted, and above CREDIT passes and SHARE of the time it is off. Time
goes on, so it is tried again now and then, and at worst that is what it costs.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

from .drafts import WINDOW, Draft
from .step import MOST_TOKENS

CREDIT, SHARE = 0.75, 0.01
GAIN = 4.0  # passes of the model that may be lost again after they were won
SAMPLES = 9  # of a time, whose median counts
FIRST = 2  # plain passes before anything is guessed, after one that warms up
AGAIN = 64  # checks after which a plain pass is measured again
MEMORY = 0.95  # what an earlier guess counts beside the one after it
PRIOR, WEIGHT = 0.7, 1.5  # the acceptance before anything is known, and the guesses that it counts
SURE, PAUSE = 4.0, 12  # tries after which a kind that doesn't pay is left out, and for how often
PROVEN = 1 / 3  # acceptance on a few tokens, from which on a draft is worth reading all
INVESTED = 0.25  # of the time that is left, which reading may take then


class Times(dict[int, float]):
    """Seconds of what takes n of something, the median of the last SAMPLES for each n."""

    def __init__(self) -> None:
        self.samples: dict[int, deque[float]] = {}

    def note(self, n: int, seconds: float) -> None:
        samples = self.samples.setdefault(n, deque(maxlen=SAMPLES))
        samples.append(seconds)
        self[n] = median(samples)

    def of(self, n: int) -> float:
        """What n take: between two that are known on a line, beside all of them as the nearest."""
        if n in self or not self:
            return self.get(n, 0.0)
        low = max((m for m in self if m < n), default=None)
        high = min((m for m in self if m > n), default=None)
        if low is None or high is None:
            return self[max(self) if high is None else min(self)]
        return self[low] + (self[high] - self[low]) * (n - low) / (high - low)


class Pace:
    """What a session knows of its times. fixed: always so many guesses; None: as many as pay."""

    def __init__(self, fixed: int | None) -> None:
        self.fixed = fixed
        self._passes = Times()  # of a pass, by its tokens
        self._drafts = Times()  # of the draft, by its guesses of a row
        self._reading = 0.0  # seconds in which a draft reads a token that it missed
        self._kinds: dict[int, list[float]] = {}  # of each kind: guesses that were kept, and tried
        self._left_out: dict[int, int] = {}  # how often a kind was, since none of its was kept
        self.begin(0, 0.0)

    def begin(self, steps: int, reading: float) -> None:
        """A generation begins. steps: of each row; reading: seconds that a token of a prompt is
        reckoned to take the draft.
        """
        self._left, self._reading = steps, reading
        self._rows = self._since = self._warm = 0
        self._asked: dict[int, int] = {}
        self._lost = self._spent = 0.0
        self._invested = False

    def wants(self, draft: Draft, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> bool:
        """Whether the draft is to guess for these rows now."""
        self._asked.clear()
        if self.fixed is not None:
            return True
        self._rows = len(rows)
        known = self._passes.samples.get(len(rows), ())
        if len(known) < FIRST or self._since >= AGAIN:
            return False
        plain = self._passes[len(rows)]
        if self._lost > CREDIT * plain + SHARE * self._spent:
            return False
        missed = draft.missed(ids, rows)
        if missed > WINDOW * len(rows) or not draft.whole:
            kept, tried = self._kinds.get(0, (0.0, 0.0))
            proven = tried >= 2 and kept >= PROVEN * tried
            if not draft.whole:
                missed = sum(len(ids[b]) for b in rows)
            left = self._left * plain
            most = left * (INVESTED if proven else SHARE)
            self._invested = missed * self._reading < most
            draft.whole = self._invested
        return True

    def guesses(self, kind: int, row: int) -> int:
        """How many of a kind are wanted of a row."""
        if self.fixed is not None:
            return self.fixed
        self._asked[row] = kind
        kept, tried = self._kinds.get(kind, (0.0, 0.0))
        a = (kept + PRIOR * WEIGHT) / (tried + WEIGHT)
        rows, plain = self._rows, self._passes.of(self._rows)
        most = 1 + min(int(tried), max(self._drafts, default=0))
        best, speed, tokens, power = 1, 0.0, 1.0, 1.0
        for k in range(1, min(MOST_TOKENS - 1, most) + 1):
            power *= a
            tokens += power
            seconds = self._drafts.of(k) + self._passes.of(min(rows * (k + 1), MOST_TOKENS))
            found = tokens / seconds
            if found > speed:
                best, speed = k, found
        if speed * plain > 1:
            return best
        # One that is believed not to pay is tried as long as that may be lost; of several kinds
        # (0 is that of all guesses of a model) it is left out, so that it costs the others little.
        if kind and tried >= SURE and self._left_out.get(kind, PAUSE) < PAUSE:
            self._left_out[kind] += 1
            return 0
        return 1

    def passed(self, tokens: int, seconds: float, drafting: float) -> None:
        """A plain pass took so long, and the draft, which had no guess."""
        self._since, self._left = 0, self._left - 1
        self._warm += 1
        if self._warm > 1:
            self._passes.note(tokens, seconds)
        self._spent += seconds + drafting
        self._lost += drafting

    def checked(self, counts: dict[int, tuple[int, int]], seconds: float, drafting: float) -> None:
        """A pass took so long, and the draft. counts: of each row, (guesses, those kept)."""
        rows, most = len(counts), max(n for n, _ in counts.values())
        kept = sum(right for _, right in counts.values())
        self._since += 1
        self._passes.note(rows + sum(n for n, _ in counts.values()), seconds)
        for row, (n, right) in counts.items():
            if n:
                tried, kind = min(n, right + 1), self._asked.get(row, 0)
                known = self._kinds.setdefault(kind, [0.0, 0.0])
                self._left_out[kind] = PAUSE if right else 0
                known[:] = (c * MEMORY**tried for c in known)
                known[0] += right
                known[1] += tried
        if not self._invested:
            self._drafts.note(most, drafting)
        gained = 1 + kept / rows
        self._left -= round(gained)
        if self.fixed is None:
            plain = self._passes.of(rows)
            if self._invested:  # what it read is no loss, or it would be off at once
                drafting = self._drafts.of(most)
            spent = seconds + drafting
            self._spent += spent
            self._lost = max(self._lost + spent - gained * plain, -GAIN * plain)
        self._invested = False
