"""Weights whose numbers point elsewhere are refused before a kernel follows them: when they are
given, when they are changed, alone and in a decoder."""

import re
from dataclasses import replace

import pytest
import torch

from elmkernels import decode_step, linear
from elmkernels.openelm.compressed import packed12_module
from elmkernels.testing import runnable
from elmkernels.testing.cases.decode_step import arena, decoder
from elmkernels.testing.cases.draw import Draw
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.checks import check_stored
from elmkernels.weights.formats import Packed12
from elmkernels.weights.indices import _PASSED
from elmkernels.weights.packed12 import pack_weight

BACKENDS = [*runnable("linear"), "reference"]
DECODING = [*runnable("decode_step"), "reference"]
MOST = 2**31 - 1
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def many_escapes(rows=4, k=256, seed=0):
    """Exponents of a wide range: about half of the weights are escapes."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(0, 40, (rows, k), generator=generator)
    drawn = torch.randn(rows, k, generator=generator)
    return pack_weight((drawn * torch.exp2(-spread.float())).bfloat16())


def with_escapes(*rows, k=256, starts=None):
    """A weight with these columns as the escapes of its rows."""
    columns = [c for row in rows for c in row]
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    return Packed12(
        many_escapes(len(rows), k).data,
        torch.arange(16, dtype=torch.uint8),
        ends if starts is None else torch.tensor(starts, dtype=torch.int32),
        torch.tensor(columns, dtype=torch.int32),
        torch.ones(len(columns), dtype=torch.bfloat16),
        k,
    )


WRONG = {
    "a column below": (with_escapes([5], [-(10**9)]), r"escape_columns must be in [0, 256)"),
    "a column at the end": (with_escapes([256], [5]), r"escape_columns must be in [0, 256)"),
    "the largest column": (with_escapes([0, MOST]), r"escape_columns must be in [0, 256)"),
    "a row descends": (
        with_escapes([1], [9, 200, 7]),
        "ascending within each row, got 200 before 7 in row 1"),
    "the first row descends": (
        with_escapes([255, 0], [1]), "ascending within each row, got 255 before 0 in row 0"),
    "the last row descends": (
        with_escapes([], [], [8, 3]), "ascending within each row, got 8 before 3 in row 2"),
    "a column twice": (with_escapes([4], [7, 7]), "got 7 before 7 in row 1"),
    "all rows descend": (with_escapes([9, 8, 7], [6, 5, 4]), "got 9 before 8 in row 0"),
    "starts far away": (
        with_escapes([1], [2], starts=[0, 2**30, 2**30]), "escape_starts must be rising"),
    "starts from 1": (with_escapes([1], [2], starts=[1, 1, 2]), "escape_starts must be rising"),
    "starts end early": (with_escapes([1], [2], starts=[0, 1, 1]), "escape_starts must be rising"),
    "starts fall": (
        with_escapes([1], [2], [3], starts=[0, 3, 1, 3]), "rising from 0 to 3, got 3 before 1"),
    "starts below 0": (
        with_escapes([1], [2], [3], starts=[0, -5, 1, 3]), "rising from 0 to 3, got 0 before -5"),
    "starts whose differences wrap": (
        with_escapes([1], [2], [3], [4], starts=[0, MOST, -MOST - 1, -1, 4]),
        f"rising from 0 to 4, got {MOST} before {-MOST - 1}"),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("what", WRONG)
def test_linear_refuses_escapes_that_are_not_the_rows_own(what, rows, backend):
    weight, message = WRONG[what]
    for _ in range(2):  # refused once, it isn't taken the next time
        with pytest.raises(ValueError, match=re.escape(message)):
            linear(torch.ones(rows, 256, dtype=torch.bfloat16), weight, backend=backend)


@pytest.mark.parametrize("what", WRONG)
def test_a_stored_weight_is_refused_too(what):
    weight, message = WRONG[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_stored("stored", weight)


@pytest.mark.parametrize("seed", range(20))
def test_every_packed_weight_passes(seed):
    rows, k = 1 + seed % 5, (1, 7, 128, 129, 300)[seed // 4]
    check_stored("weight", many_escapes(rows, k, seed))
    for columns in ([], [0], list(range(k))):
        check_stored("weight", with_escapes(columns, [], columns, k=k))


def decoding(layer=1, matrix="out_proj"):
    """A packed decoder, a matrix of it, and the call."""
    d = Draw(torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(0))
    weights = decoder(d, "packed12", vocab_size=130)
    layers = list(weights.layers)
    n, k = getattr(layers[layer], matrix).shape
    changed = many_escapes(n, k)
    layers[layer] = layers[layer]._replace(**{matrix: changed})
    weights = replace(weights, layers=tuple(layers))
    call = (weights, torch.tensor([1, 2]), torch.tensor([0, 3]), arena(d, weights, 2, 6))
    return changed, call


CHANGES = {
    "a column": lambda w: w.escape_columns[3:4].fill_(10**6),
    "two columns": lambda w: w.escape_columns[:2].copy_(w.escape_columns[:2].flip(0)),
    "a start": lambda w: w.escape_starts[1].fill_(-7),
    "all starts": lambda w: w.escape_starts.add_(2**20),
    "their memory": lambda w: setattr(w.escape_columns, "data", w.escape_columns.flip(0)),
}


@every_backend
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_is_changed_is_read_again(change, backend):
    weight = many_escapes()
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    before = linear(x, weight, backend=backend)
    again = many_escapes()
    CHANGES[change](weight)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weight\.escape_"):
            linear(x, weight, backend=backend)
    weight.escape_columns.data = again.escape_columns
    weight.escape_starts.copy_(again.escape_starts)
    assert torch.equal(linear(x, weight, backend=backend), before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_whose_weight_is_changed_is_read_again(change):
    weight, call = decoding()
    with torch.inference_mode():
        decode_step(*call)
        CHANGES[change](weight)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"weights\.layers\[1\]\.out_proj\.escape_"):
                decode_step(*call)


def test_a_module_and_its_buffers_are_read_once():
    module = packed12_module("proj", many_escapes())
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = module(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Packed12, "check_numbers", None)
            assert torch.equal(module(x), before)
        module.escape_columns[0] = 999
        with pytest.raises(ValueError, match="escape_columns must be in"):
            module(x)


def test_nothing_is_remembered_of_a_weight_that_is_gone():
    known = set(_PASSED)
    weight = many_escapes()
    linear(torch.ones(1, 256, dtype=torch.bfloat16), weight)
    assert set(_PASSED) - known
    del weight
    assert set(_PASSED) == known


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_stored_affine_weight_is_finite(part, bad):
    weight = quantize_weight(torch.randn(5, 64), 4, 32)
    check_stored("stored", weight)
    getattr(weight, part)[3, 1] = bad
    with pytest.raises(ValueError, match=rf"stored\.{part} must be finite, got inf or nan"):
        check_stored("stored", weight)


def step_arena(**parts):
    """A decoder of two layers, of 2 and 3 key heads of 64, and an arena of 2 rows of 6 tokens."""
    d = Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    weights = decoder(d, model_dim=64, vocab_size=9)
    cache = arena(d, weights, 2, 6)
    changed = {k: change(cache) for k, change in parts.items()}
    return weights, torch.tensor([1, 2]), torch.tensor([0, 3]), cache._replace(**changed)


def offsets(at, value):
    def changed(cache):
        found = cache.offsets.clone()
        found[at] = value
        return found

    return changed


# Shares: 1536 elements each in layer 0, 2304 in layer 1, 7680 in all.
ARENAS = {
    "too small": (
        {"data": lambda c: c.data[:-1]},
        "arena.offsets[1, 1] must be so that 2304 elements from there on are among 7679"),
    "empty": ({"data": lambda c: c.data[:0]}, "arena.offsets[0, 0] must be so that 1536"),
    "keys far away": ({"offsets": offsets((0, 0), 1 << 34)}, "got 17179869184"),
    "values far away": ({"offsets": offsets((1, 1), 1 << 62)}, "got 4611686018427387904"),
    "below": ({"offsets": offsets((1, 0), -4)}, "arena.offsets[1, 0] must be so that"),
    "far below": ({"offsets": offsets((0, 1), -(1 << 63))}, "got -9223372036854775808"),
    "one beyond": ({"offsets": offsets((1, 1), 7680 - 2303)}, "among 7680, got 5377"),
    "keys on values": (
        {"offsets": offsets((0, 1), 1535)},
        "arena.offsets[0, 1] must be at least 1536, the end of arena.offsets[0, 0]'s share"),
    "layers on each other": ({"offsets": offsets((1, 0), 100)}, "must be at least"),
    "longer than it is": ({"max_length": lambda c: 7}, "must be at least 1792"),
    "without a token": ({"max_length": lambda c: 0}, "arena.max_length must be a positive integer"),
    "negative": ({"max_length": lambda c: -6}, "arena.max_length must be a positive integer"),
    "half a token": ({"max_length": lambda c: 5.5}, "arena.max_length must be a positive integer"),
}  # fmt: skip


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("what", ARENAS)
def test_an_arena_that_is_not_what_it_says_is_refused(what, backend):
    parts, message = ARENAS[what]
    call = step_arena(**parts)
    before = call[3].data.clone()
    with torch.inference_mode():
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(message)):
                decode_step(*call, backend=backend)
    assert torch.equal(call[3].data, before)


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("change", ["offsets", "data"])
def test_an_arena_that_is_changed_is_read_again(change, backend):
    call = step_arena()
    before = decode_step(*call, backend=backend)
    if change == "offsets":
        call[3].offsets[1, 1] += 1
    else:
        call[3].data.resize_(100)
    with pytest.raises(ValueError, match=r"arena\.offsets\["):
        decode_step(*call, backend=backend)
    if change == "offsets":
        call[3].offsets[1, 1] -= 1
        assert torch.equal(decode_step(*call, backend=backend), before)


def clones(weights):
    for x in weights.weights():
        x.data = x.data.clone()


@pytest.mark.parametrize("backend", runnable("decode_step"))
def test_weights_whose_memory_is_replaced_are_found_again(backend):
    call = step_arena()
    before = decode_step(*call, backend=backend)
    old = [x.data for x in call[0].weights()]
    clones(call[0])
    for x in old:
        x.fill_(torch.nan)
    assert torch.equal(decode_step(*call, backend=backend), before)


REPLACED = {
    "another dtype": (lambda w: w.half(), TypeError, "must be torch.float32 like norm"),
    "columns first": (
        lambda w: w.t().contiguous().t(),
        ValueError,
        "must be of contiguous rows, got strides (1, 64)",
    ),
    "shorter": (lambda w: w[:5].clone(), ValueError, "must be [64, 384], got [5, 384]"),
}


@pytest.mark.parametrize("backend", runnable("decode_step"))
@pytest.mark.parametrize("how", REPLACED)
def test_weights_whose_memory_is_replaced_by_another_kind_are_refused(how, backend):
    change, kind, message = REPLACED[how]
    call = step_arena()
    decode_step(*call, backend=backend)
    w = call[0].layers[1].proj_2
    w.data = change(w.data)
    with pytest.raises(kind, match=re.escape(message)):
        decode_step(*call, backend=backend)


@pytest.mark.parametrize("backend", runnable("decode_step"))
def test_a_weight_that_gave_its_memory_back_is_refused(backend):
    call = step_arena()
    decode_step(*call, backend=backend)
    call[0].layers[1].proj_1.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"weights\.layers\[1\]\.proj_1 must be in memory"):
        decode_step(*call, backend=backend)


def test_weights_that_can_change_are_refused():
    weights, *rest = step_arena()
    with pytest.raises(TypeError, match=r"weights\.layers must be a tuple of Layer, got list"):
        decode_step(replace(weights, layers=list(weights.layers)), *rest)
    with pytest.raises(TypeError, match=r"weights\.layers must be a tuple of Layer"):
        decode_step(replace(weights, layers=tuple(map(tuple, weights.layers))), *rest)
    with pytest.raises(TypeError, match="weights must be DecoderWeights, got dict"):
        decode_step(vars(weights), *rest)
    with pytest.raises(TypeError, match="arena must be an Arena, got tuple"):
        decode_step(weights, *rest[:2], tuple(rest[2]))
