"""Drafts: what guesses the next tokens of rows, for the model to check several in one pass.

    lookup   what followed the last tokens where the row held them before; no model
    self     a quantized copy of the model itself
    a model  any OpenELM of the same vocabulary

A guess never decides what is written (see `speculation`): a bad draft costs time alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..checks import fail, integer
from ..compression.quantization import quantized_copy
from ..openelm.model import OpenELM
from ..surgery import mark_of
from .sampling import largest
from .step import MOST_TOKENS, go_on_greedily, new_cache, prefill, several_logits

LOOKUP, SELF = "lookup", "self"
SELF_BITS = 4
WINDOW = MOST_TOKENS  # tokens that a draft is tried on before it reads all that it missed

# How many guesses are wanted of a row, whose guess would be of a kind: guesses of one kind are
# accepted about as often.
Ask = Callable[[int, int], int]
# The tokens that logits [n, vocab_size] give for rows after their guesses so far, -1 for none; None
# for the largest.
Choose = Callable[[Tensor, Sequence[int], Sequence[Sequence[int]]], list[int]] | None


@runtime_checkable
class Draft(Protocol):
    """What guesses tokens. One is made for each session, and follows its rows.

    Attributes:
        name: in results.
        model: its model, None if it has none.
        whole: whether it is to read all tokens that it missed. One that isn't reads a few.
    """

    name: str
    whole: bool

    @property
    def model(self) -> OpenELM | None: ...

    def begin(self) -> None:
        """A generation begins: what was told of rows before may be no part of them."""
        ...

    def missed(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> int:
        """Tokens that it has to read before it can guess, beside each row's last."""
        ...

    def propose(
        self, ids: Sequence[Sequence[int]], rows: Sequence[int], ask: Ask, choose: Choose
    ) -> list[list[int]]:
        """Guess what follows.

        Args:
            ids: what each row holds for certain: so it is told what was kept of its guesses.
            rows: those that it should guess for.
            ask: how many guesses are wanted, by (kind, row).
            choose: the choice from its logits, as the model's own would be.

        Returns:
            The guesses of each row, empty for the others.
        """
        ...


class Lookup:
    """What followed the last tokens of a row where it held them before: the longest match wins,
    then the latest. A guess that reaches the row's end goes on with itself.

    Text that is edited leaves what it copies at a word and comes back right after it. So if little
    matches, the last token alone is looked for NEARBY the place that a long match has reached.
    """

    name = LOOKUP
    model: OpenELM | None = None
    SHORTEST, LONGEST, CANDIDATES = 2, 16, 16
    LONG, NEARBY = 4, 4

    def __init__(self, batch: int) -> None:
        self.whole = True
        self._known: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(batch)]
        self._read = [self.SHORTEST] * batch
        self._behind = [0] * batch  # how far before a row's end its copy goes on; 0: none does

    def begin(self) -> None:
        self.__init__(len(self._known))

    def missed(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> int:
        return 0

    def propose(
        self, ids: Sequence[Sequence[int]], rows: Sequence[int], ask: Ask, choose: Choose
    ) -> list[list[int]]:
        guesses: list[list[int]] = [[] for _ in ids]
        for b in rows:
            place, length = self._match(b, ids[b])
            if length:
                # 1 (nearby), 2, 3, 4 to 7, 8 to 15 and more tokens that match: so many kinds.
                kind = length if length < 4 else 4 if length < 8 else 8 if length < 16 else 16
                held = list(ids[b][place:])
                for i in range(ask(kind, b)):
                    guesses[b].append(held[i])
                    held.append(held[i])
        return guesses

    def _match(self, b: int, ids: Sequence[int]) -> tuple[int, int]:
        """Where what was there before went on, and how many tokens before it match."""
        known, n = self._known[b], self.SHORTEST
        for end in range(self._read[b], len(ids)):
            known.setdefault(tuple(ids[end - n : end]), []).append(end)
        self._read[b] = max(self._read[b], len(ids))
        best = 0, 0
        for place in reversed(known.get(tuple(ids[-n:]), ())[-self.CANDIDATES :]):
            length, most = n, min(place, self.LONGEST)
            while length < most and ids[place - 1 - length] == ids[-1 - length]:
                length += 1
            if length > best[1]:
                best = place, length
        if best[1] < self.LONG and (place := self._nearby(b, ids)):
            best = place, 1
        elif best[1] >= self.LONG:
            self._behind[b] = len(ids) - best[0]
        return best

    def _nearby(self, b: int, ids: Sequence[int]) -> int:
        """Where the copy goes on after the last token, 0 if that isn't found there."""
        if self._behind[b]:
            expected = len(ids) - self._behind[b]
            for i in range(self.NEARBY + 1):
                for place in (expected + i, expected - i):
                    if 0 < place < len(ids) and ids[place - 1] == ids[-1]:
                        self._behind[b] = len(ids) - place
                        return place
        return 0


class ModelDraft:
    """A model that writes on greedily, or draws as the sampling of the checked model would.

    Its cache holds the rows' tokens at the same positions as the model's. One that has missed many
    tokens (`whole` is False) is first tried on the last WINDOW of them, at positions from 0.
    """

    def __init__(self, name: str, model: OpenELM, batch: int, max_length: int, chunk: int) -> None:
        self.name, self.model, self.chunk = name, model, chunk
        self.cache = new_cache(model, batch, max_length)
        # As a Session's: at least what the cache holds, in it before it is written.
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self._starts = [0] * batch  # the token of a row that is in the cache's first place
        self._sure = [0] * batch  # tokens of `ids` that were compared with what is certain
        self._dtype = model.activation_dtype
        self.whole = True

    def begin(self) -> None:
        if (dtype := self.model.activation_dtype) != self._dtype:  # autocast began or ended
            self.cache.reset()
        self._dtype, self.whole = dtype, True
        held = zip(self.cache.rows, self._starts, strict=True)
        self.cache.truncate([0 if start else n for n, start in held])
        self._starts, self._sure = [0] * len(self._starts), [0] * len(self._sure)

    def missed(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> int:
        return sum(len(ids[b]) - 1 - self._starts[b] - self._kept(b, ids[b]) for b in rows)

    def propose(
        self, ids: Sequence[Sequence[int]], rows: Sequence[int], ask: Ask, choose: Choose
    ) -> list[list[int]]:
        guesses: list[list[int]] = [[] for _ in ids]
        limits = {b: ask(0, b) for b in rows}
        rows = [b for b in rows if limits[b] > 0]
        if not rows:
            return guesses
        new = self._caught_up(ids, rows)
        while not (choose is None and self._go_on(rows, new, limits, guesses)):
            logits = self._logits(rows, new)
            chosen = largest(logits).tolist() if choose is None else choose(logits, rows, guesses)
            for b, token in zip(rows, chosen, strict=True):
                guesses[b] += [token] * (token >= 0)
            rows = [b for b, token in zip(rows, chosen, strict=True) if token >= 0]
            rows = [b for b in rows if len(guesses[b]) < limits[b]]
            if not rows:
                break
            new = [guesses[b][-1:] if b in rows else [] for b in range(len(ids))]
            for b in rows:
                self.ids[b] += new[b]
        return guesses

    def _go_on(
        self,
        rows: list[int],
        new: list[list[int]],
        limits: dict[int, int],
        guesses: list[list[int]],
    ) -> bool:
        """All guesses that are left at once, after tokens that aren't in the cache; False if that
        can't be.
        """
        steps = max(limits[b] - len(guesses[b]) for b in rows)
        held = self.cache.rows
        most = max(held[b] + len(new[b]) for b in rows) + steps - 1
        if most > self.cache.max_length or sum(map(len, new)) > MOST_TOKENS:
            return False
        found = go_on_greedily(self.model, new, self.cache, steps)
        if found is None:
            return False
        for b, more in zip(rows, found.t().tolist(), strict=True):
            self.ids[b] += more[:-1]  # what was written, before it is counted
            guesses[b] += more[: limits[b] - len(guesses[b])]
        self.cache.advance([len(row) + (steps - 1) * bool(row) for row in new])
        return True

    def _kept(self, b: int, truth: Sequence[int]) -> int:
        """How many tokens in the cache are the row's, less its last one."""
        held, start, known = self.cache.rows[b], self._starts[b], self.ids[b]
        most = max(0, min(held, len(truth) - 1 - start))
        at = min(self._sure[b], most)
        while at < most and known[at] == truth[start + at]:
            at += 1
        self._sure[b] = at
        return at

    def _caught_up(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[int]]:
        """What of some rows is still to be read, now that the cache holds nothing else of them."""
        kept = self.cache.rows
        for b in rows:
            kept[b] = self._kept(b, ids[b])
            missed = len(ids[b]) - 1 - self._starts[b] - kept[b]
            if (self.whole and self._starts[b]) or (not self.whole and missed > WINDOW):
                kept[b], self._sure[b] = 0, 0
                self._starts[b] = 0 if self.whole else max(0, len(ids[b]) - WINDOW)
        self.cache.truncate(kept)
        new: list[list[int]] = [[] for _ in ids]
        for b in rows:
            del self.ids[b][kept[b] :]
            new[b] = list(ids[b][self._starts[b] + kept[b] :])
            self.ids[b] += new[b]
        for b, held in enumerate(kept):
            del self.ids[b][held + len(new[b]) :]
        return new

    def _logits(self, rows: Sequence[int], new: Sequence[Sequence[int]]) -> Tensor:
        """Those after the new tokens of some rows, [len(rows), vocab_size]."""
        most = max(self.cache.rows) + max(map(len, new))
        if sum(map(len, new)) <= MOST_TOKENS and most <= self.cache.max_length:
            logits = several_logits(self.model, new, self.cache)
            ends = torch.tensor([len(new[b]) for b in rows]).cumsum(0) - 1
            return logits if len(logits) == len(rows) else logits[ends.to(logits.device)]
        logits = prefill(self.model, self.ids, self.cache, self.chunk)
        return logits if len(logits) == len(rows) else logits[list(rows)]


# Copies of models, with what their weights were then.
_COPIES: WeakKeyDictionary[OpenELM, tuple[Any, OpenELM]] = WeakKeyDictionary()


def self_draft(model: OpenELM, bits: int = SELF_BITS) -> OpenELM:
    """The quantized copy of a model that `draft="self"` takes; the same one until weights change.

    Args:
        model: an `elmkernels.OpenELM`, accelerated or not; it stays as it is.
        bits: 8 or 4.

    Returns:
        The copy, accelerated as the model is. It takes 0.28 of the bytes that the matrices take in
        bfloat16 with 4 bits, 0.53 with 8.

    Raises:
        ValueError: its weights can't be quantized, or don't say all that it computes.

    Example:
        >>> draft = self_draft(model)
        >>> rows = elmkernels.generate(model, [[1, 2, 3]], 20, draft=draft)
    """
    tensors = [*model.parameters(), *model.buffers()]
    written = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    facts = bits, mark_of(model), written
    known = _COPIES.get(model)
    if known is None or known[0] != facts:
        _COPIES[model] = known = facts, quantized_copy(model, bits)
    return known[1]


def check_draft(draft: Any, draft_tokens: Any, model: OpenELM, max_length: int) -> None:
    """Raise TypeError or ValueError unless it is a draft for a model whose rows hold at most
    max_length tokens, and nothing is asked of one that there isn't.
    """
    if draft_tokens is not None:
        if draft is None:
            fail("draft_tokens", "None without a draft", draft_tokens)
        integer("draft_tokens", draft_tokens, 1)
    if draft is None or isinstance(draft, str):
        if draft not in (None, LOOKUP, SELF):
            fail("draft", f"{LOOKUP!r}, {SELF!r} or a model", repr(draft))
        return
    if not isinstance(draft, OpenELM):
        kind = type(draft).__name__
        fail("draft", f"{LOOKUP!r}, {SELF!r} or an elmkernels.OpenELM", kind, TypeError)
    ours, its = model.config, draft.config
    if its.vocab_size != ours.vocab_size:
        fail("draft", f"of the model's vocabulary of {ours.vocab_size} tokens", its.vocab_size)
    if its.rope_max_length < max_length:
        what = f"a model of at least {max_length} positions (rope_max_length), as rows may be long"
        fail("draft", what, its.rope_max_length)
    here, there = model.norm.weight.device, draft.norm.weight.device
    if there != here:
        fail("draft", f"on {here} like the model", there)


def made_draft(draft: Any, model: OpenELM, batch: int, max_length: int, chunk: int) -> Draft:
    """What guesses for the rows of one session."""
    if draft == LOOKUP:
        return Lookup(batch)
    if isinstance(draft, str):
        return ModelDraft(SELF, self_draft(model), batch, max_length, chunk)
    return ModelDraft("draft", draft, batch, max_length, chunk)
