"""Windows, their order over epochs, and documents inside them, against plain loops."""

import numpy as np
import pytest
import torch
from helpers.corpora import EOS, documents, tokens_of

from elmkernels.training.data.sequences import IGNORE, Sequences
from elmkernels.training.data.tokens import Tokens


def looped(ids: list[int], length: int, windows: list[int]) -> tuple[list, list, list]:
    """Inputs, targets and boundaries of windows, one token at a time."""
    inputs, targets, bounds = [], [], []
    for row, window in enumerate(windows):
        begin = window * length
        inputs.append([ids[begin + t] for t in range(length)])
        wanted = []
        for t in range(length):
            first = t == 0 or ids[begin + t - 1] == EOS
            if first:
                bounds.append(row * length + t)
            # The end of a document has no next token of its own.
            wanted.append(IGNORE if ids[begin + t] == EOS else ids[begin + t + 1])
        targets.append(wanted)
    return inputs, targets, [*bounds, len(windows) * length]


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("longest", [0, 3, 40])
def test_packed_documents_are_those_of_a_plain_loop(length, longest):
    ids = documents(seed=length, count=60, longest=longest)
    sequences = Sequences(tokens_of(ids), length, seed=3)
    batch = sequences.batch(0, len(sequences))
    inputs, targets, bounds = looped(ids, length, sequences.order(0).tolist())
    assert batch.input_ids.tolist() == inputs
    assert batch.targets.tolist() == targets
    assert batch.cu_seqlens.tolist() == bounds
    assert {t.dtype for t in batch} == {torch.int64}


def test_without_documents_every_next_token_is_a_target():
    ids = documents(seed=1, count=30, longest=9)
    sequences = Sequences(tokens_of(ids), 8, separate_documents=False, seed=None)
    batch = sequences.batch(0, 3)
    assert batch.cu_seqlens is None
    assert batch.input_ids.flatten().tolist() == ids[:24]
    assert batch.targets.flatten().tolist() == ids[1:25]


def test_a_window_needs_its_last_target():
    assert len(Sequences(tokens_of([1] * 17), 8)) == 2
    assert len(Sequences(tokens_of([1] * 16), 8)) == 1


@pytest.mark.parametrize("first", [0, 5, 23, 1000])
@pytest.mark.parametrize("parts", [[20], [10, 10], [1] * 20, [3, 7, 10]])
def test_batches_don_t_depend_on_how_they_are_split(first, parts):
    tokens = tokens_of(documents(seed=2, count=20, longest=20))
    whole = Sequences(tokens, 16, seed=5).batch(first, 20)
    other, at = [], first
    for count in parts:
        # As after a resumption: nothing is remembered.
        other.append(Sequences(tokens, 16, seed=5).batch(at, count))
        at += count
    assert torch.equal(torch.cat([b.input_ids for b in other]), whole.input_ids)
    assert torch.equal(torch.cat([b.targets for b in other]), whole.targets)
    bounds, rows = [], 0
    for b in other:
        bounds += [rows * 16 + bound for bound in b.cu_seqlens[:-1].tolist()]
        rows += len(b.input_ids)
    assert [*bounds, 20 * 16] == whole.cu_seqlens.tolist()


def test_every_epoch_has_each_window_once_in_an_order_of_its_own():
    tokens = tokens_of(list(range(200)) + [EOS])
    sequences = Sequences(tokens, 4, seed=0)
    count = len(sequences)
    epochs = [sequences.windows(epoch * count, count) for epoch in range(3)]
    assert all(sorted(windows) == list(range(count)) for windows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sequences.windows(0, 3 * count) == sum(epochs, [])
    assert Sequences(tokens, 4, seed=1).windows(0, count) != epochs[0]
    assert Sequences(tokens, 4, seed=None).windows(0, 2 * count) == 2 * list(range(count))


def test_the_order_of_an_epoch_is_kept_and_takes_no_more_than_it_must():
    sequences = Sequences(tokens_of([1] * 2001), 2, seed=0)
    assert sequences.order(4) is sequences.order(4)
    assert sequences.order(4).dtype == np.uint16


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Sequences(tokens_of([1] * 16), 16), "at least 17 tokens .* got 16"),
        (lambda: Sequences(Tokens([], 300, EOS), 16), "at least 17 tokens .* got 0"),
        (lambda: Sequences(tokens_of([1] * 40), 0), "sequence_length must be a positive"),
        (lambda: Sequences(tokens_of([1] * 40), 4, seed=-1), "seed must be 0 or more"),
        (lambda: Sequences(tokens_of([1] * 40, eos=None), 4), "separate_documents needs"),
        (lambda: Sequences(tokens_of([1] * 40), 4).batch(-1, 1), "first must be 0 or more"),
        (lambda: Sequences(tokens_of([1] * 40), 4).batch(0, 0), "count must be a positive"),
        (lambda: Sequences(tokens_of([1] * 40), 4).order(-1), "epoch must be 0 or more"),
    ],
)
def test_errors(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read():
    sequences = Sequences(tokens_of([*[1] * 30, 999, *[1] * 30]), 4, seed=None)
    sequences.batch(0, 7)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 300\).*999 at position 30"):
        sequences.batch(7, 1)
