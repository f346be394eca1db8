"""activations="int8": how rows are rounded, that kernels round so, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch

from elmkernels import decode_step, linear, reference, rms_norm, swiglu
from elmkernels.reference import INT8_GROUP, int8_rows
from elmkernels.testing import runnable
from elmkernels.testing.cases.decode_step import arena, decoder
from elmkernels.testing.cases.draw import Draw
from elmkernels.weights import pack_weight, quantize_weight
from elmkernels.weights.formats import Affine

BACKENDS = [*runnable("linear"), "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [(bits, group) for bits in (8, 4) for group in (32, 64)]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize(("bits", "group"), FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


def draw(dtype=torch.float32, seed=0) -> Draw:
    return Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed))


def readout(k: int, bits: int, group: int) -> Affine:
    """The unit matrix: a product with it gives the rows that it was multiplied by. Its zeros are
    codes too, so that each column meets every other group's."""
    q = torch.eye(k, dtype=torch.int64)
    shifts = torch.arange(0, 32, bits)
    words = (q.view(k, -1, 32 // bits) << shifts).sum(-1)
    words = words.to(torch.int32).view(torch.uint32)
    scales = torch.ones(k, k // group)
    return Affine(words, scales, torch.zeros_like(scales), bits, group)


def by_hand(row: list[float]) -> list[float]:
    """A group by the formula, in Python's floats: exact for these."""
    scale = max(map(abs, row)) / 127
    return [scale * round(x / scale) if scale else 0.0 for x in row]


def special_rows() -> torch.Tensor:
    """Of scale 1: ties on both sides of zero; zeros; one number alone; the least normal scale and
    one below; what no code holds exactly."""
    ties = [127.0, *(i + 0.5 for i in range(-20, 11))]
    zeros, alone = [0.0] * 32, [0.0] * 31 + [-3.25]
    tiny = torch.finfo(torch.float32).tiny
    least, below = [127 * tiny] + [60 * tiny] * 31, [126 * tiny] * 32
    spread = [1.7**i for i in range(32)]
    return torch.tensor([ties, zeros, alone, least, below, spread])


def test_the_formula():
    rows = special_rows()
    got = int8_rows(rows)
    assert (
        got[0].tolist() == by_hand(rows[0].tolist()) == [127.0, *map(round, rows[0, 1:].tolist())]
    )
    assert (got[1] == 0).all() and (got[4] == 0).all()
    assert got[2, -1] == -3.25 and (got[2, :-1] == 0).all()
    assert torch.equal(got[3], rows[3])
    spread = torch.tensor(by_hand(rows[5].double().tolist()))
    assert ((got[5] - spread).abs() <= 8 * torch.finfo(spread.dtype).eps * spread.abs()).all()


@every_dtype
def test_half_a_step_at_most(dtype):
    x = draw(dtype).outliers(7, 256)
    groups = x.float().unflatten(-1, (-1, INT8_GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127
    exact = int8_rows(x.double()).unflatten(-1, (-1, INT8_GROUP))
    assert ((exact - groups).abs() <= step * 0.5001).all()
    assert torch.equal(int8_rows(x), exact.flatten(-2).to(dtype))
    assert int8_rows(x).dtype == dtype


@every_backend
@every_form
def test_kernels_round_as_the_reference(bits, group, backend):
    """Read back code by code, the group anywhere in a row: half a step off would show."""
    d = draw()
    groups = torch.cat([special_rows(), d.normal(4, INT8_GROUP), d.outliers(6, INT8_GROUP)])
    w = readout(6 * INT8_GROUP, bits, group)
    for place, dtype in itertools.product((0, 3, 5), DTYPES):
        x = torch.zeros(len(groups), 6, INT8_GROUP, dtype=dtype)
        x[:, place] = groups.clamp(-6e4, 6e4).to(dtype)
        x = x.flatten(1)
        # Few rows at a time: of many x itself is rounded.
        parts = [linear(p, w, activations="int8", backend=backend) for p in x.split(5)]
        got = torch.cat(parts).float()
        expected, step = int8_rows(x.float()), x.float().abs().amax(-1, keepdim=True) / 127
        room = 0.02 * step + torch.finfo(dtype).eps * expected.abs()
        assert ((got - expected).abs() <= room).all(), (place, dtype)


@every_backend
@every_form
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_makes_its_row_nan(value, bits, group, backend):
    x = draw().normal(3, 192)
    w = quantize_weight(draw(seed=1).normal(20, 192), bits, group)
    whole = linear(x, w, activations="int8", backend=backend)
    x[1, 70] = value
    got = linear(x, w, activations="int8", backend=backend)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], whole[::2])


@every_backend
@every_form
@every_dtype
def test_the_same_bits_in_any_batch_by_any_threads(backend, bits, group, dtype):
    x, w = draw(dtype).normal(8, 320), quantize_weight(draw(dtype, 1).normal(515, 320), bits, group)
    whole = linear(x, w, activations="int8", backend=backend)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 5, 8):
                if backend == "reference" and rows < 8:
                    continue
                got = linear(x[:rows], w, activations="int8", backend=backend)
                assert torch.equal(got, whole[:rows])
    finally:
        torch.set_num_threads(before)


@every_backend
def test_around_the_product(backend):
    """A norm comes before the rounding; swiglu and a residual after it."""
    d = draw(torch.bfloat16)
    x, norm = d.normal(3, 192), d.weight(192).detach()
    w, up = quantize_weight(d.normal(192, 192)), quantize_weight(d.normal(96, 192))
    options = {"activations": "int8", "backend": backend}
    normed = rms_norm(x, norm, backend=backend)
    assert torch.equal(linear(x, w, norm=norm, **options), linear(normed, w, **options))
    assert torch.equal(linear(x, w, residual=x, **options), x + linear(x, w, **options))
    apart = swiglu(linear(x, up, **options), backend=backend)
    assert torch.equal(linear(x, up, swiglu=True, **options), apart)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in runnable("decode_step")])
@every_form
def test_a_step_is_its_products(bits, group, backend):
    """The head of a decoder without layers is the op."""
    d = draw(torch.bfloat16)
    form = f"affine{bits}_{group}"
    weights = decoder(d, form, heads=(), ffn_dims=(), activations="int8")
    tokens, positions = torch.tensor([5, 9, 70]), torch.tensor([0, 1, 2])
    cache = arena(d, weights, 3, 8)
    got = decode_step(weights, tokens, positions, cache, backend=backend)
    hidden = reference.dense(weights.embedding, torch.bfloat16)[tokens]
    options = {"norm": weights.norm, "activations": "int8", "backend": backend}
    assert torch.equal(got, linear(hidden, weights.head, **options))
    plain = replace(weights, activations=None)
    plain = decode_step(plain, tokens, positions, cache, backend=backend)
    assert not torch.equal(got, plain)


def test_refusals():
    x, w = torch.randn(2, 64), torch.randn(8, 64)
    q = quantize_weight(w)
    for bad in (w, pack_weight(w.bfloat16())):
        y = x.to(bad.dtype)
        with pytest.raises(ValueError, match="activations must be None with weights that aren't"):
            linear(y, bad, activations="int8")
    with pytest.raises(ValueError, match="activations must be 'int8' or None, got 'int4'"):
        linear(x, q, activations="int4")
    for named in ("reference", None):
        with pytest.raises(NotImplementedError, match="linear has no derivative of activations"):
            linear(x.clone().requires_grad_(), q, activations="int8", backend=named)
    with torch.no_grad():
        linear(x.clone().requires_grad_(), q, activations="int8")


@pytest.mark.parametrize("backend", [*runnable("decode_step"), "reference"])
def test_a_step_refuses(backend):
    d = draw()
    for form, activations, message in (
        ("plain", "int8", "weights.activations must be None with weights that aren't quantized"),
        ("affine4_64", "int4", "weights.activations must be 'int8' or None, got 'int4'"),
    ):
        weights = decoder(d, form, heads=(), ffn_dims=(), activations=activations)
        cache = arena(d, weights, 1, 8)
        zero = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            decode_step(weights, zero, zero, cache, backend=backend)
