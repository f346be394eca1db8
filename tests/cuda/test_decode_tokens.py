"""Several tokens of a sequence in one launch of decode_step's CUDA sources, run on a host: the bits
of one by one, and what the kernel does of what it can't refuse.
"""

import pytest
import torch
from helpers.decode_simulation import ORDERS, comparisons, decoding, simulated

from elmkernels.testing.cases.weights import FORMS, dtypes_of
from elmkernels.weights.formats import DecoderWeights

every_form = pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in FORMS for dtype in dtypes_of(form)],
    ids=lambda x: str(x).removeprefix("torch."),
)

# Positions and sequences of tokens of one pass, as in tests/ops/test_decoder_contract.py.
ARRANGED = [
    ([200, 201], [0, 0]),
    (list(range(60, 68)), [3] * 8),
    (list(range(8)), [1] * 8),
    ([127, 128, 5, 6, 63, 64, 65, 0], [1, 1, 0, 0, 3, 3, 3, 2]),
]


@every_form
@pytest.mark.parametrize(("grid", "order"), [(7, "shuffled"), (41, "reversed")])
def test_tokens_of_a_sequence_have_the_bits_of_one_by_one(library, grid, order, form, dtype):
    weights, _, _, cache = decoding(form, dtype)
    for positions, sequences in ARRANGED:
        call = [torch.arange(len(positions)), torch.tensor(positions), torch.tensor(sequences)]
        kept, own = (cache._replace(data=cache.data.clone()) for _ in range(2))
        rows = [[x[i : i + 1] for x in call] for i in range(len(positions))]
        alone = simulated(library, grid, rows=1)
        expected = torch.cat([alone(weights, *row[:2], own, sequences=row[2]) for row in rows])
        chosen = torch.full_like(call[0], -1)
        step = simulated(library, grid, order=order, seed=grid)
        got = step(weights, *call[:2], kept, sequences=call[2], chosen=chosen)
        assert torch.equal(got, expected)
        assert torch.equal(kept.data, own.data)
        assert torch.equal(chosen, got.argmax(-1))


# What the kernel can't refuse: positions and sequences, and the tokens that have no place then.
MISPLACED = {
    "a position is left out": ([5, 6, 8, 3], [0, 0, 0, 1], [2]),
    "a position comes twice": ([5, 5, 6, 3], [0, 0, 0, 1], [1, 2]),
    "positions fall": ([5, 4, 3, 3], [0, 0, 0, 1], [1, 2]),
    "a sequence apart": ([5, 3, 6, 7], [0, 1, 0, 0], [2, 3]),
    "no such sequence": ([5, 6, 3, 4], [0, 0, 4, 4], [2, 3]),
    "a sequence below 0": ([5, 6, 3, 4], [0, 0, -1, 2], [2]),
    "beyond the cache": ([208, 209, 210, 3], [0, 0, 0, 1], [2]),
    "the largest position": ([2**63 - 1, -(2**63), 5, 3], [0, 0, 2, 1], [0, 1]),
}


@pytest.mark.parametrize("what", MISPLACED)
def test_tokens_without_a_place_give_nan_and_the_others_what_they_give_alone(library, what):
    positions, sequences, wrong = MISPLACED[what]
    weights, tokens, _, cache = decoding("plain", torch.bfloat16)
    call = tokens, torch.tensor(positions), torch.tensor(sequences)
    before = cache.data.clone()
    got = simulated(library)(weights, *call[:2], cache, sequences=call[2])
    right = [i for i in range(4) if i not in wrong]
    own = cache._replace(data=before)
    rows = [[x[i : i + 1] for x in call] for i in right]
    alone = [simulated(library)(weights, *row[:2], own, sequences=row[2]) for row in rows]
    assert got[wrong].isnan().all()
    assert torch.equal(got[right], torch.cat(alone))
    assert torch.equal(cache.data, own.data)


def test_behind_a_token_that_is_wrong_its_sequence_is_nan(library):
    weights, tokens, _, cache = decoding("plain", torch.bfloat16)
    tokens[1] = -1
    before = cache.data.clone()
    call = tokens, torch.tensor([5, 6, 7, 9])
    got = simulated(library)(weights, *call, cache, sequences=torch.tensor([0, 0, 0, 1]))
    assert got[1:3].isnan().all()
    assert got[[0, 3]].isfinite().all()
    kept = cache._replace(data=before)
    for i, layer in enumerate(weights.layers):
        pairs = zip(cache.views(i, layer.kv_heads), kept.views(i, layer.kv_heads), strict=True)
        assert all(torch.equal(after[0, 6:], old[0, 6:]) for after, old in pairs)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_token_knows_nothing_of_the_ones_behind_it(library, value):
    weights, _, _, cache = decoding("plain", torch.float32)
    embedding = weights.embedding.clone()
    embedding[5] = value
    weights = DecoderWeights(**{**vars(weights), "embedding": embedding})
    call = torch.tensor([7, 9, 5, 8]), torch.arange(62, 66)
    own = cache._replace(data=cache.data.clone())
    rows = torch.zeros(4, dtype=torch.int64)
    got = simulated(library)(weights, *call, cache, sequences=rows)
    expected = simulated(library)(weights, *(x[:2] for x in call), own, sequences=rows[:2])
    assert expected.isfinite().all()
    assert torch.equal(got[:2], expected)
    assert not got[2:].isfinite().any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(library, order):
    """As with one token a sequence: items make their new keys themselves."""
    *call, cache = decoding("plain", torch.float32)
    positions, sequences = torch.tensor([199, 200, 7, 8]), torch.tensor([0, 0, 1, 1])
    for barrier in range(library.count_barriers(len(call[0].layers))):
        step = simulated(library, 5, order=order, missing=barrier)
        found = comparisons(step, *call[:2], positions, cache, sequences=sequences)
        assert not all(c.ok for c in found), f"nothing shows without barrier {barrier}"
