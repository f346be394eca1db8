"""Sequences of equal length cut out of the tokens, in an endless shuffled order.

Window i of length T holds tokens iT .. iT + T: T inputs and, one further, T targets. Documents
follow one another and may be cut; what a window can see of each is told by `cu_seqlens`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import checks
from .tokens import Tokens

IGNORE = -100  # a target that is none


class VarlenBatch(NamedTuple):
    """input_ids, targets: int64 [b, T]; a target is IGNORE where the next token belongs to another
    document. cu_seqlens: int64 [documents + 1], where documents begin in the b*T tokens, row by
    row, and at last b*T; every row begins one. None if documents aren't kept apart.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None


class Sequences:
    """The windows of a corpus, numbered 0, 1, ... without end.

    Number n is entry n % len of epoch n // len, and every epoch has a permutation of its own, from
    the seed and the epoch alone (seed None: the corpus's order). Where a run stands in its data is
    therefore one integer, and any split of the numbers over processes gives the same sequences.

    Raises ValueError for a corpus that is too short for one window, and for documents to be kept
    apart with no eos to tell them by.
    """

    def __init__(
        self,
        tokens: Tokens,
        sequence_length: int,
        separate_documents: bool = True,
        seed: int | None = 0,
    ) -> None:
        checks.positive("sequence_length", sequence_length)
        if seed is not None and seed < 0:
            checks.fail("seed", "0 or more", seed)
        if separate_documents and tokens.eos is None:
            raise ValueError("separate_documents needs the id that ends documents, eos is None")
        self.tokens, self.length = tokens, sequence_length
        self.separate_documents, self.seed = separate_documents, seed
        self._count = max(0, len(tokens) - 1) // sequence_length
        if not self._count:
            raise ValueError(
                f"the corpus must have at least {sequence_length + 1} tokens "
                f"(sequence_length {sequence_length} and the last target), got {len(tokens)}"
            )
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> np.ndarray:
        """The windows of an epoch, in its order: integers [len]."""
        if epoch < 0:
            checks.fail("epoch", "0 or more", epoch)
        if self._order is None or self._order[0] != epoch:
            # Half the memory of int64 matters at a billion windows.
            self._order = None
            windows = np.arange(self._count, dtype=np.min_scalar_type(self._count))
            if self.seed is not None:
                np.random.default_rng([self.seed, epoch]).shuffle(windows)
            self._order = (epoch, windows)
        return self._order[1]

    def windows(self, first: int, count: int) -> list[int]:
        """Which windows the sequences number first .. first + count - 1 are."""
        if first < 0:
            checks.fail("first", "0 or more", first)
        checks.positive("count", count)
        found, number = [], first
        while number < first + count:
            epoch, at = divmod(number, self._count)
            taken = self.order(epoch)[at : at + first + count - number]
            found += taken.tolist()
            number += len(taken)
        return found

    def batch(self, first: int, count: int) -> VarlenBatch:
        """The `count` sequences from number `first` on."""
        length = self.length
        ids = np.empty((count, length + 1), np.int64)
        for row, window in zip(ids, self.windows(first, count), strict=True):
            row[:] = self.tokens.read(window * length, (window + 1) * length + 1)
        inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
        cu_seqlens = None
        if self.separate_documents:
            ends = inputs == self.tokens.eos
            targets[ends] = IGNORE
            begins = np.ones((count, length), bool)
            begins[:, 1:] = ends[:, :-1]
            bounds = np.append(np.flatnonzero(begins), count * length)
            cu_seqlens = torch.from_numpy(bounds.astype(np.int64))
        return VarlenBatch(torch.from_numpy(inputs), torch.from_numpy(targets), cu_seqlens)
