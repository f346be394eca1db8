"""Choosing the next token from logits [rows, vocab_size], in this order:

    repetition penalty   logit / penalty if it is positive, else logit * penalty, for every token
                         that the row holds already
    temperature          logits / temperature; 0 takes the largest, where nothing below applies
                         (top_k and top_p are refused then), and so does one below float32's
                         smallest normal number
    top_k                the k largest remain, and what ties with the last of them
    top_p                the fewest of the largest whose probabilities sum to top_p or more remain
    draw                 from the softmax of what remains, by one uniform number a row

All in float32, the sums of probabilities in float64. Each row draws from a generator of its own, so
that what it draws depends on its seed and logits alone, not on its neighbours. A choice from logits
of which one is NaN is -1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..checks import fail, integer, is_integer

# Candidates that top_p looks at first: sorting a whole vocabulary costs more than a small model.
_FIRST_CANDIDATES = 512
_FLOAT32 = torch.finfo(torch.float32)
_SEEDS = -(2**63), 2**64  # from, to: what a torch.Generator takes


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. seed: row b draws from seed + b, or from seed[b]; None: from fresh
    entropy. Raises ValueError or TypeError, naming what is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is None and name == "top_p":
                continue
            if not isinstance(value, Real) or isinstance(value, bool):
                fail(name, "a number", repr(value), TypeError)
            object.__setattr__(self, name, float(value))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            fail("temperature", "at least 0 and finite", self.temperature)
        greedy = self.temperature == 0
        if self.temperature < _FLOAT32.tiny:  # logits can't be divided by it
            object.__setattr__(self, "temperature", 0.0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("top_k", self.top_k, 1))
        if not _FLOAT32.tiny <= self.repetition_penalty <= _FLOAT32.max:
            fail("repetition_penalty", "positive and finite in float32", self.repetition_penalty)
        for name in ("top_k", "top_p"):
            if greedy and (value := getattr(self, name)) is not None:
                fail(name, "None at temperature 0, which takes the likeliest token", value)
        object.__setattr__(self, "seed", _seeds(self.seed))

    def generators(self, rows: int) -> list[torch.Generator]:
        """One for each row, on the CPU. Raises ValueError for a seed that is neither None, an
        integer nor one integer a row.
        """
        seeds: Any = self.seed
        if seeds is None:
            generators = [torch.Generator() for _ in range(rows)]
            for generator in generators:
                generator.seed()
            return generators
        if is_integer(seeds):
            seeds = [seeds + row for row in range(rows)]
            _check_seeds(seeds, self.seed)
        if len(seeds) != rows:
            fail("seed", f"an integer or one for each of {rows} rows", list(seeds))
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def _seeds(given: Any) -> int | tuple[int, ...] | None:
    """A seed, or those of all rows, as Python's integers that torch takes."""
    if given is None:
        return None
    found: Any = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(found, Iterable) and not isinstance(found, str | bytes):
        seeds = list(found)
        _check_seeds(seeds, given)
        return tuple(int(seed) for seed in seeds)
    _check_seeds([found], given)
    return int(found)


def _check_seeds(seeds: list[Any], given: Any) -> None:
    for seed in seeds:
        if not is_integer(seed):
            expected = "None, an integer or one for each row"
            fail("seed", expected, repr(given), TypeError)
        if not _SEEDS[0] <= seed < _SEEDS[1]:
            fail("seed", "at least -2^63 and less than 2^64", seed)


class Sampler:
    """The choices of `rows` rows, one after another; on a GPU nothing is waited for.

    held: the tokens that each row begins with (for the repetition penalty). steps: how many choices
    there are at most, as the numbers of all of them are drawn here, on the CPU.
    """

    def __init__(
        self,
        sampling: Sampling,
        held: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
        steps: int,
    ) -> None:
        self.sampling = sampling
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        generators = sampling.generators(len(held))
        self.uniforms: Tensor | None = None  # [steps, rows]
        if sampling.temperature != 0:
            rows = [torch.rand(steps, dtype=torch.float64, generator=g) for g in generators]
            self.uniforms = torch.stack(rows, 1).to(device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(held), vocab_size, dtype=torch.bool, device=device)
            for row, tokens in enumerate(held):
                self.seen[row, torch.tensor(tokens, dtype=torch.int64, device=device)] = True

    @property
    def form(self) -> tuple:
        """What its operations depend on; samplers of one form differ in their numbers alone."""
        s = self.sampling
        return s.temperature, s.top_k, s.top_p, s.repetition_penalty

    @property
    def greedy(self) -> bool:
        """Whether the largest of the logits as they are is taken."""
        return self.uniforms is None and self.seen is None

    def take(self, other: "Sampler") -> None:
        """Go on as a sampler of the same form and of no more steps would, at the same addresses."""
        self.sampling = other.sampling
        self.count.copy_(other.count)
        if self.uniforms is not None and other.uniforms is not None:
            self.uniforms[: other.uniforms.shape[0]].copy_(other.uniforms)
        if self.seen is not None and other.seen is not None:
            self.seen.copy_(other.seen)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [rows, vocab_size] of any floating dtype -> tokens, int64 [rows]: -1 if one of the
        row's logits is NaN.
        """
        uniforms = None
        if self.uniforms is not None:
            uniforms = self.uniforms.index_select(0, self.count)[0]
        tokens = self._chosen(logits, self.seen, uniforms)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        self.count.add_(1)
        return tokens

    def at(self, logits: Tensor, choices: Sequence[tuple[int, int]], after: Sequence) -> Tensor:
        """What would be chosen, without going on.

        logits: [n, vocab_size]. choices: of each, (row, which of its choices it is). after: tokens
        that the row holds by then beside those that were told (`hold`) -> tokens, int64 [n].
        """
        if self.greedy:
            return largest(logits)
        rows, steps = torch.tensor(choices, device=logits.device).unbind(1)
        uniforms = None if self.uniforms is None else self.uniforms[steps, rows]
        seen = None
        if self.seen is not None:
            seen = self.seen[rows]
            for i, tokens in enumerate(after):
                seen[i, list(tokens)] = True
        return self._chosen(logits, seen, uniforms)

    def hold(self, row: int, tokens: Sequence[int]) -> None:
        """The row holds these tokens too."""
        if self.seen is not None:
            self.seen[row, list(tokens)] = True

    def _chosen(self, logits: Tensor, seen: Tensor | None, uniforms: Tensor | None) -> Tensor:
        s = self.sampling
        if seen is not None:
            logits = penalize(logits.float(), seen, s.repetition_penalty)
        if uniforms is None:
            return largest(logits)
        return draw(warp(logits, s.temperature, s.top_k, s.top_p), uniforms)


def largest(logits: Tensor) -> Tensor:
    """The first of the largest of logits [rows, vocab_size], int64 [rows]; -1 if one is NaN."""
    return unless_nan(argmax(logits), logits)


def argmax(logits: Tensor) -> Tensor:
    """torch.argmax of logits [rows, vocab_size] over the vocabulary. On a CPU torch.max finds the
    same one, the first of the largest or of NaN, sooner.
    """
    return logits.max(-1).indices if logits.device.type == "cpu" else logits.argmax(-1)


def unless_nan(tokens: Tensor, logits: Tensor) -> Tensor:
    """tokens int64 [rows] as torch.argmax finds them, to which NaN is the largest: -1 for that."""
    return tokens.masked_fill(logits.gather(1, tokens[:, None])[:, 0].isnan(), -1)


def check_choices(tokens: Sequence[int], rows: Sequence[int] | None = None) -> None:
    """Raise ValueError if the token of a row is none. rows: those that are looked at; None: all."""
    for row in range(len(tokens)) if rows is None else rows:
        if tokens[row] < 0:
            fail("logits", "numbers to choose a token", f"NaN in row {row}")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [rows, vocab_size] made less likely (penalty > 1) where seen is True."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def warp(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits [rows, vocab_size] -> float32, divided by the temperature, up to a constant a row,
    and -inf for what top_k and top_p leave out.
    """
    logits = logits.float()
    # The largest is 0 first, so that no temperature is too small: 0 / t is 0, the rest -> -inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        logits = _top_p(logits, top_p)
    return logits


def _top_p(logits: Tensor, p: float) -> Tensor:
    probabilities = logits.softmax(-1, dtype=torch.float64)
    vocab_size = logits.shape[-1]
    # Whether a few are enough can be asked for nothing on a CPU only.
    few = logits.device.type == "cpu" and vocab_size > _FIRST_CANDIDATES
    found, tokens = probabilities.topk(_FIRST_CANDIDATES if few else vocab_size)
    sums = found.cumsum(-1)
    if few and not bool((sums[:, -1] >= p).all()):
        found, tokens = probabilities.topk(vocab_size)
        sums = found.cumsum(-1)
    # A token remains if those before it don't reach p: the first one always.
    before = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), dim=-1)
    kept = logits.gather(1, tokens).masked_fill(before >= p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter_(1, tokens, kept)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row of logits [rows, vocab_size] by its softmax: the first whose cumulated
    probability exceeds uniform, float64 [rows] in [0, 1), times their sum; -1 if that is NaN.
    """
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = sums[:, -1]
    # u is at most 1 - 2^-53, so that u total < total even after rounding: a token is always found,
    # and never one of probability 0, whose sum exceeds nothing that its predecessor's doesn't.
    tokens = torch.searchsorted(sums, (uniform * total)[:, None], right=True)[:, 0]
    return tokens.where(total.isfinite(), -1)
