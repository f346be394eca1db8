"""linear's own corners in Triton, run by test_interpreted.py in an interpreted process.

The interpreter doesn't round bfloat16, so that packed weights, which the op takes with bfloat16
alone, meet float32 and float16 activations here: the kernels take those too.
"""

import pytest
import torch

from elmkernels import ops, reference
from elmkernels.ops.linear import dense_rows
from elmkernels.testing.cases.draw import Draw
from elmkernels.testing.cases.weights import FORMS, compressed, many_escapes
from elmkernels.testing.parity import compare, poisoned
from elmkernels.triton import linear as kernels
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.formats import Packed12
from elmkernels.weights.packed12 import pack_weight

HALF = torch.float16


def draw(dtype=HALF, seed=0):
    return Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed))


def packed(n, k, escapes=False):
    d = draw(torch.bfloat16)
    return pack_weight(many_escapes(d, n, k) if escapes else d.normal(n, k, scale=k**-0.5))


def held(x, weight: Packed12, norm=None, swiglu=False, residual=None):
    """The kernels with a packed weight against the reference with the dense one."""
    around = (norm, 1e-6, swiglu, residual)
    with poisoned():
        if norm is None and residual is None and not swiglu:
            got = kernels.linear_fwd(x, *weight.parts())
        else:
            got = kernels.linear_fused(x, *weight.parts(), *around)
    dense = reference.dense(weight)
    wide = [None if t is None else t.double() for t in (norm, residual)]
    truth = reference.linear(x.double(), dense.double(), wide[0], 1e-6, swiglu, wide[1])
    found = compare(truth, reference.linear(x, dense.to(x.dtype), *around), got)
    assert found.ok, found.reason


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("k", [1, 7, 128, 200, 1300])
def test_packed_weights(dtype, k):
    d = draw(dtype, k)
    for rows in (1, 3, 8):
        held(d.normal(rows, k), packed(40, k))
        held(d.normal(rows, k), packed(40, k, escapes=True))


@pytest.mark.parametrize("escapes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_packed_weights_with_what_comes_before_and_after(dtype, escapes):
    d = draw(dtype)
    weight = packed(100, 300, escapes)
    for rows in (1, 6):
        x, norm = d.normal(rows, 300), d.weight(300).detach()
        held(x, weight, norm)
        held(x, weight, norm, residual=d.normal(rows, 100))
        if not escapes:  # which are too small for float16's products
            held(x, weight, norm, swiglu=True)
            held(x, weight, swiglu=True)


@pytest.mark.parametrize("shape", [(70, 200), (9, 128), (40, 1)])
@pytest.mark.parametrize("escapes", [False, True])
def test_packed_weights_are_dense_bit_for_bit(shape, escapes):
    dense = reference.dense(packed(*shape, escapes))
    dense.view(torch.int16)[::5] = 0x7F83  # a NaN, whose bits are kept too
    weight = pack_weight(dense)
    expected = reference.dense(weight)
    with poisoned():
        got = dense_rows(weight, torch.bfloat16, 0, shape[0], backend="triton")
        some = dense_rows(weight, torch.bfloat16, 3, 8, backend="triton")
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(some.view(torch.int16), expected[3:8].view(torch.int16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_quantised_weights_are_dense_bit_for_bit(bits, dtype):
    weight = quantize_weight(draw(dtype).normal(70, 192), bits, 32)
    with poisoned():
        got = dense_rows(weight, dtype, 5, 70, backend="triton")
    assert torch.equal(got, reference.dense(weight, dtype)[5:])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "packed12"])
def test_the_same_call_gives_the_same_bits(form):
    d = draw(torch.float32)
    x, w = d.normal(8, 320), compressed(form, d.normal(50, 320, scale=0.06))
    around = {"norm": d.weight(320).detach(), "residual": d.normal(8, 50), "backend": "triton"}
    assert torch.equal(ops.linear(x, w, **around), ops.linear(x, w, **around))


def test_a_row_depends_on_no_other():
    """Of small whole numbers, whose sums are exact: numpy, which adds up here, has an order of its
    own for every shape. (test_compiled_linear.py holds a GPU's to be one.)"""
    d = draw(torch.float32)
    x, w, residual = (d.normal(*shape, scale=4).round() for shape in ((8, 320), (50, 320), (8, 50)))
    whole = ops.linear(x, w, residual=residual, backend="triton")
    assert torch.equal(whole, residual + x @ w.T)
    for rows in range(1, 8):
        some = ops.linear(x[:rows], w, residual=residual[:rows], backend="triton")
        assert torch.equal(some, whole[:rows])


def test_a_plain_row_is_the_same_in_its_own_kernel_and_in_the_fused_one():
    d = draw()
    x, w, residual = d.normal(3, 200), d.normal(60, 200, scale=0.07), d.normal(3, 60)
    y = ops.linear(x, w, backend="triton")
    assert torch.equal(ops.linear(x, w, residual=residual, backend="triton"), residual + y)
    gated = ops.linear(x, w, swiglu=True, backend="triton")
    assert torch.equal(gated, ops.swiglu(y, backend="triton"))


def test_rows_farther_apart_than_int32_can_say():
    apart = 2**31 + 64
    memory = torch.empty(apart + 64, dtype=HALF)  # never touched between its two rows
    far = memory.as_strided((2, 64), (apart, 1))
    far.copy_(draw().normal(2, 64))
    near, other = far.contiguous(), draw(seed=1).normal(2, 64)
    options = {"norm": draw(seed=2).weight(64).detach(), "backend": "triton"}
    assert torch.equal(ops.linear(other, far, **options), ops.linear(other, near, **options))
    assert torch.equal(ops.linear(far, other, **options), ops.linear(near, other, **options))
    options = {"swiglu": True, "backend": "triton"}
    assert torch.equal(ops.linear(other, far, **options), ops.linear(other, near, **options))
    narrow = draw(seed=3).normal(64, 64)
    residual = {"residual": far, "backend": "triton"}, {"residual": near, "backend": "triton"}
    first, second = (ops.linear(other, narrow, **options) for options in residual)
    assert torch.equal(first, second)


def test_what_is_not_finite_stays_in_its_row():
    d = draw(torch.float32)
    x, w = d.normal(4, 200), d.normal(30, 200)
    norm = d.weight(200).detach()
    clean = ops.linear(x, w, norm=norm, backend="triton")
    x[2, 7] = torch.nan
    got = ops.linear(x, w, norm=norm, backend="triton")
    others = torch.tensor([0, 1, 3])
    assert torch.equal(got[others], clean[others])
    assert got[2].isnan().all()
