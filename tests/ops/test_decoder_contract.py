"""What linear and decode_step promise beyond numbers: the same bits whatever the batch, the
threads, the tokens beside one and the form that holds a bfloat16 matrix; only what they own is
written.
"""

import dataclasses
import gc
from functools import partial
from itertools import chain

import pytest
import torch

from elmkernels import decode_step, linear, reference
from elmkernels.testing import OPS, runnable
from elmkernels.testing.cases.decode_step import arena, decoder, with_written
from elmkernels.testing.cases.draw import Draw
from elmkernels.testing.cases.weights import FORMS, dtypes_of, weight
from elmkernels.testing.equivalent import reordered
from elmkernels.testing.parity import EVALUATIONS, compare
from elmkernels.weights.formats import Layer, Packed12
from elmkernels.weights.packed12 import pack_weight
from elmkernels.weights.table import _TABLES

BACKENDS = runnable("decode_step")
POSITIONS = torch.tensor([0, 150, 63, 64, 1, 129, 17, 70])

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in FORMS for dtype in dtypes_of(form)],
    ids=lambda x: str(x).removeprefix("torch."),
)


def draw(dtype, seed=0):
    return Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed))


def decoding(form, dtype, batch=8):
    d = draw(dtype)
    weights = decoder(d, form)
    tokens = torch.randint(0, weights.vocab_size, (8,), generator=d.generator)
    return weights, tokens[:batch], POSITIONS[:batch], arena(d, weights, batch, 160)


def fresh(cache):
    return cache._replace(data=cache.data.clone())


def of_threads(count, fn):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return fn()
    finally:
        torch.set_num_threads(before)


@every_backend
@every_form
def test_linear_has_the_same_bits_in_any_batch_by_any_threads(backend, form, dtype):
    d = draw(dtype)
    x, w = d.normal(8, 320), weight(d, form, 515, 320)
    whole = linear(x, w, backend=backend)
    for rows in range(1, 9):
        assert torch.equal(linear(x[:rows], w, backend=backend), whole[:rows])
    assert torch.equal(linear(x[6], w, backend=backend), whole[6])
    for count in (1, 2, 3, 8):
        assert torch.equal(of_threads(count, lambda: linear(x, w, backend=backend)), whole)


@every_backend
@every_form
def test_decode_step_has_the_same_bits_in_any_batch_by_any_threads(backend, form, dtype):
    weights, tokens, positions, cache = decoding(form, dtype)
    step = with_written(decode_step)
    kept = fresh(cache)
    whole, _ = step(weights, tokens, positions, kept, backend=backend)
    for b in (0, 1, 7):
        own = arena(draw(dtype), weights, 1, cache.max_length)
        for i, layer in enumerate(weights.layers):
            pairs = zip(own.views(i, layer.kv_heads), cache.views(i, layer.kv_heads), strict=True)
            for alone, all_rows in pairs:
                alone.copy_(all_rows[b : b + 1])
        got = decode_step(weights, tokens[b : b + 1], positions[b : b + 1], own, backend=backend)
        assert torch.equal(got[0], whole[b])
        for i, layer in enumerate(weights.layers):
            pairs = zip(own.views(i, layer.kv_heads), kept.views(i, layer.kv_heads), strict=True)
            assert all(torch.equal(alone[0], all_rows[b]) for alone, all_rows in pairs)
    for count in (1, 2, 3, 8):
        again = fresh(cache)
        call = (weights, tokens, positions, again)
        got = of_threads(count, lambda call=call: decode_step(*call, backend=backend))
        assert torch.equal(got, whole)
        assert torch.equal(again.data, kept.data)


# Positions and sequences of tokens of one pass: 1 to 8 of one sequence, on both sides of a block of
# keys' end; several sequences, in any order; from an empty cache on.
ARRANGED = [
    *((list(range(124, 124 + n)), [2] * n) for n in range(1, 9)),
    (list(range(8)), [0] * 8),
    ([0, 1, 150, 60, 61, 62, 63, 64], [2, 2, 3, 0, 0, 0, 0, 0]),
    ([127, 128, 5, 6, 7, 126, 127, 128], [1, 1, 0, 0, 0, 2, 2, 2]),
    ([9, 130, 131], [3, 1, 1]),
]


def both_ways(step, weights, cache, positions, sequences, seed=0):
    """(logits and cache) of one pass, and of tokens one by one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, weights.vocab_size, (len(positions),), generator=generator)
    call = [tokens, torch.tensor(positions), torch.tensor(sequences)]
    kept, own = fresh(cache), fresh(cache)
    logits = step(weights, *call[:2], kept, sequences=call[2])
    rows = [[x[i : i + 1] for x in call] for i in range(len(positions))]
    alone = [step(weights, *row[:2], own, sequences=row[2]) for row in rows]
    return (logits, kept.data), (torch.cat(alone), own.data)


OTHER_HEADS = {
    "groups_of_8": {"heads": ((8, 1), (16, 2))},
    "no_groups": {"heads": ((3, 3), (5, 5))},
    "head_dim_20": {"head_dim": 20},
    "head_dim_128": {"head_dim": 128},
}


@every_backend
@pytest.mark.parametrize(
    ("form", "dtype", "heads"),
    [
        *((form, dtype, "") for form in FORMS for dtype in dtypes_of(form)),
        *(("plain", dtype, heads) for heads in OTHER_HEADS for dtype in dtypes_of("plain")),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_tokens_of_a_sequence_have_the_bits_of_one_by_one(backend, form, dtype, heads):
    d = draw(dtype)
    weights = decoder(d, form, **OTHER_HEADS.get(heads, {}))
    cache = arena(d, weights, 4, 160)
    step = partial(decode_step, backend=backend)
    for positions, sequences in ARRANGED:
        one_pass, alone = both_ways(step, weights, cache, positions, sequences)
        assert all(map(torch.equal, one_pass, alone)), (positions, sequences)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_a_sequence_have_the_bits_of_one_by_one_over_a_long_cache(backend, dtype):
    d = draw(dtype)
    weights = decoder(d, table_length=2100)
    cache = arena(d, weights, 2, 2100)
    step = partial(decode_step, backend=backend)
    for first in (2000, 2047, 2090):
        for threads in (1, 3):
            places = list(range(first, first + 8))
            one_pass, alone = of_threads(
                threads, lambda at=places: both_ways(step, weights, cache, at, [1] * 8)
            )
            assert all(map(torch.equal, one_pass, alone))


@every_backend
@every_form
def test_of_several_tokens_the_likeliest_are_those_of_argmax(backend, form, dtype):
    weights, _, _, cache = decoding(form, dtype, 4)
    for positions, sequences in ARRANGED[3::3]:
        tokens = torch.arange(len(positions))
        call = (weights, tokens, torch.tensor(positions), cache)
        logits = decode_step(
            *call, sequences=torch.tensor(sequences), chosen=tokens, backend=backend
        )
        assert torch.equal(tokens, logits.argmax(-1))


@every_backend
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_knows_nothing_of_the_ones_behind_it(backend, value, dtype):
    """Even if their keys and values are no numbers."""
    weights, _, _, cache = decoding("plain", dtype, 4)
    embedding = weights.embedding.clone()
    embedding[5] = value
    weights = dataclasses.replace(weights, embedding=embedding)
    for first in (0, 60, 126, 127):
        call = torch.tensor([7, 9, 5, 8]), torch.arange(first, first + 4)
        rows = torch.full((4,), 1)
        got = decode_step(weights, *call, fresh(cache), sequences=rows, backend=backend)
        alone = fresh(cache)
        for i in range(2):
            at = slice(i, i + 1)
            expected = decode_step(
                weights, *(x[at] for x in call), alone, sequences=rows[at], backend=backend
            )
            assert expected.isfinite().all()
            assert torch.equal(got[at], expected)
        assert not got[2:].isfinite().any()


@every_backend
@every_form
def test_of_several_tokens_only_their_places_are_written_and_seen(backend, form, dtype):
    weights, _, _, cache = decoding(form, dtype, 4)
    positions, sequences = (torch.tensor(x) for x in ARRANGED[-2])
    tokens = torch.arange(len(positions))
    poisoned = fresh(cache)
    poisoned.data.fill_(torch.nan)
    for i, layer in enumerate(weights.layers):
        pairs = zip(poisoned.views(i, layer.kv_heads), cache.views(i, layer.kv_heads), strict=True)
        for bad, good in pairs:
            for row in sequences.unique().tolist():
                before = int(positions[sequences == row].min())
                bad[row, :before] = good[row, :before]
    unwritten = poisoned.data.isnan().sum()
    call = (weights, tokens, positions)
    expected = decode_step(*call, fresh(cache), sequences=sequences, backend=backend)
    got = decode_step(*call, poisoned, sequences=sequences, backend=backend)
    assert torch.equal(got, expected)
    width = sum(2 * layer.kv_heads for layer in weights.layers) * weights.head_dim
    assert unwritten - poisoned.data.isnan().sum() == width * len(tokens)


@every_backend
@pytest.mark.parametrize("k", [1, 7, 31, 64, 127, 128, 129, 200, 1000])
def test_packed_is_plain_bit_for_bit(backend, k):
    d = draw(torch.bfloat16)
    for w in (d.normal(70, k), d.normal(70, k) * torch.exp2(-40 * d.normal(70, k).abs())):
        packed = pack_weight(w)
        for rows in (1, 4, 8, 20):
            x = d.normal(rows, k)
            got, expected = (linear(x, form, backend=backend) for form in (packed, w))
            assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@every_backend
def test_a_packed_decoder_is_the_plain_one_bit_for_bit(backend):
    packed, tokens, positions, cache = decoding("packed12", torch.bfloat16)

    def dense(w):
        return reference.dense(w) if isinstance(w, Packed12) else w

    plain = dataclasses.replace(
        packed,
        embedding=dense(packed.embedding),
        head=dense(packed.head),
        layers=tuple(Layer(*map(dense, layer)) for layer in packed.layers),
    )
    first, second = fresh(cache), fresh(cache)
    got = decode_step(packed, tokens, positions, first, backend=backend)
    assert torch.equal(got, decode_step(plain, tokens, positions, second, backend=backend))
    assert torch.equal(first.data, second.data)


@every_backend
@pytest.mark.parametrize("form", FORMS)
def test_linear_is_traced_whole(backend, form):
    d = draw(torch.bfloat16)
    x, w = d.normal(3, 128), weight(d, form, 70, 128)
    torch.compiler.reset()
    traced = torch.compile(
        lambda x: linear(x, w, backend=backend) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(traced(x), linear(x, w, backend=backend) + 1)


@every_backend
@every_form
def test_what_lies_beyond_the_positions_is_neither_read_nor_written(backend, form, dtype):
    weights, tokens, positions, cache = decoding(form, dtype)
    poisoned = fresh(cache)
    poisoned.data.fill_(torch.nan)
    for i, layer in enumerate(weights.layers):
        pairs = zip(poisoned.views(i, layer.kv_heads), cache.views(i, layer.kv_heads), strict=True)
        for bad, good in pairs:
            for b, p in enumerate(positions.tolist()):
                bad[b, :p] = good[b, :p]
    before, known = fresh(poisoned), fresh(cache)
    got = decode_step(weights, tokens, positions, poisoned, backend=backend)
    assert torch.equal(got, decode_step(weights, tokens, positions, known, backend=backend))
    rows = torch.arange(len(tokens))
    for i, layer in enumerate(weights.layers):
        for after, old in zip(
            poisoned.views(i, layer.kv_heads), before.views(i, layer.kv_heads), strict=True
        ):
            assert after[rows, positions].isfinite().all()
            old[rows, positions] = after[rows, positions]
    assert torch.equal(poisoned.data.nan_to_num(7), before.data.nan_to_num(7))


@every_backend
@pytest.mark.parametrize("call", ["tokens", "positions", "sequences"])
def test_strided_indices_are_inputs(backend, call):
    weights, tokens, positions, cache = decoding("plain", torch.float32, 3)
    expected = decode_step(weights, tokens, positions, fresh(cache), backend=backend)
    wide = {"tokens": tokens, "positions": positions, "sequences": torch.arange(3)}
    wide[call] = torch.stack((wide[call], wide[call] * 0 - 1), dim=1)[:, 0]
    assert torch.equal(decode_step(weights, **wide, arena=fresh(cache), backend=backend), expected)


@every_backend
@every_form
def test_the_likeliest_tokens_are_those_of_argmax(backend, form, dtype):
    for batch in (1, 3, 8):
        weights, tokens, positions, cache = decoding(form, dtype, batch)
        plain = decode_step(weights, tokens, positions, fresh(cache), backend=backend)
        for name in (backend, "reference"):
            chosen = torch.full_like(tokens, -1)
            call = (weights, tokens, positions, fresh(cache))
            got = decode_step(*call, chosen=chosen, backend=name)
            assert torch.equal(chosen, got.argmax(-1))
            assert name == "reference" or torch.equal(got, plain)
            place = tokens.clone()
            decode_step(weights, place, *call[2:], chosen=place, backend=name)
            assert torch.equal(place, chosen)


@every_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "value"), [((), 0.0), ((150, 77, 190), torch.nan), ((), torch.nan)]
)
def test_of_equal_logits_and_of_nan_the_first_is_chosen(backend, threads, rows, value):
    """`rows` of the vocabulary are all `value`, or every one is."""
    weights, tokens, positions, cache = decoding("plain", torch.bfloat16)
    head = weights.head.clone()
    head[list(rows) or slice(None)] = value
    weights, chosen = dataclasses.replace(weights, head=head), torch.full_like(tokens, -1)
    call = (weights, tokens, positions, cache)
    of_threads(threads, lambda: decode_step(*call, chosen=chosen, backend=backend))
    assert chosen.tolist() == [min(rows, default=0)] * len(tokens)


@every_backend
def test_other_weights_with_some_of_the_same_parts_are_another_decoder(backend):
    """Also where the old one is gone and its addresses are taken again."""
    weights, tokens, positions, cache = decoding("plain", torch.float32, 3)
    first = decode_step(weights, tokens, positions, fresh(cache), backend=backend)
    for seed in range(1, 6):
        other = decoder(draw(torch.float32, seed))
        mixed = dataclasses.replace(weights, layers=other.layers, head=other.head)
        got, expected = (
            decode_step(mixed, tokens, positions, fresh(cache), backend=name)
            for name in (backend, "reference")
        )
        del other, mixed
        torch.testing.assert_close(got, expected)
        assert not torch.equal(got, first)
    del weights
    gc.collect()
    assert not _TABLES


@every_backend
@pytest.mark.parametrize("bad", [-1, 203, 2**40])
def test_an_index_outside_is_refused_before_anything_is_written(backend, bad):
    weights, tokens, positions, cache = decoding("plain", torch.float32, 3)
    wrong = torch.tensor([1, bad, 0])
    before = cache.data.clone()
    for name in (backend, "reference"):
        with pytest.raises(ValueError, match=rf"^tokens must be in \[0, 203\).*{bad}"):
            decode_step(weights, wrong, positions, cache, backend=name)
        with pytest.raises(ValueError, match=r"positions must be in \[0, "):
            decode_step(weights, tokens, wrong, cache, backend=name)
    assert torch.equal(cache.data, before)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [24, pytest.param(512, marks=pytest.mark.slow)])
def test_every_step_has_parity(backend, dtype, steps):
    """From an empty cache, each step on its own keys and values, as a generation goes."""
    sizes = {"model_dim": 64, "head_dim": 16, "ffn_dims": (64, 96), "table_length": 512}
    weights = decoder(draw(dtype), heads=((4, 1), (4, 2)), **sizes)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, weights.vocab_size, (steps, 8), generator=generator)
    cache = arena(draw(dtype), weights, 8, steps)
    wide, plain = cache._replace(data=cache.data.double()), fresh(cache)
    for i in range(steps):
        call = (weights, tokens[i], torch.full((8,), i))
        got = decode_step(*call, cache, backend=backend)
        before = plain.data.clone()
        truth, yardstick = (reference.decode_step(*call, c) for c in (wide, plain))
        # As right as the yardstick, evaluated if it is exceeded.
        others = (
            reordered(OPS["decode_step"].reordered, n)(*call, plain._replace(data=before.clone()))
            for n in range(1, EVALUATIONS)
        )
        found = compare(truth, chain([yardstick], others), got, f"logits of step {i}")
        assert found.ok, f"{found.what}: {found.reason}"
