"""What linear and decode_step promise beyond numbers: the same bits whatever the batch, the threads
and the form that holds a bfloat16 matrix; only what they own is written.
"""

import dataclasses
import gc
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
    for rows in (1, 2, 3, 5, 8):
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
@pytest.mark.parametrize("call", ["tokens", "positions"])
def test_strided_indices_are_inputs(backend, call):
    weights, tokens, positions, cache = decoding("plain", torch.float32, 3)
    expected = decode_step(weights, tokens, positions, fresh(cache), backend=backend)
    wide = {"tokens": tokens, "positions": positions}
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
