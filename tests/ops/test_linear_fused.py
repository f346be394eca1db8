"""linear with what comes before and after it: what it refuses, and that where it is composed it has
the bits of one after the other.
"""

import re

import pytest
import torch

from elmkernels import linear, rms_norm, swiglu
from elmkernels.backends import optional_kernel
from elmkernels.testing import runnable
from elmkernels.testing.cases.weights import FORMS, compressed
from elmkernels.weights.affine import quantize_weight
from elmkernels.weights.packed12 import pack_weight

BACKENDS = [*runnable("linear"), "reference"]
X, W = torch.randn(3, 64), torch.randn(10, 64)
NORM, RESIDUAL = torch.rand(64), torch.randn(3, 10)
AFFINE, PACKED = quantize_weight(W, 4, 32), pack_weight(W.bfloat16())

every_backend = pytest.mark.parametrize("backend", BACKENDS)

WRONG = {
    "norm is a list": (
        {"norm": [1.0]}, TypeError, "norm must be a tensor, got list"),
    "norm has another width": (
        {"norm": NORM[:63]}, ValueError, "norm must be [64], got [63]"),
    "norm is a matrix": (
        {"norm": NORM[None]}, ValueError, "norm must be [64], got [1, 64]"),
    "norm has another dtype": (
        {"norm": NORM.half()}, TypeError,
        "norm must be torch.float32 like x, or torch.float32, got torch.float16"),
    "norm is elsewhere": (
        {"norm": NORM.to("meta")}, ValueError, "norm must be on cpu like x, got meta"),
    "swiglu of odd rows": (
        {"weight": W[:9], "swiglu": True}, ValueError,
        "weight must be [2n, k] with swiglu, got [9, 64]"),
    "residual is a number": (
        {"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "residual has another dtype": (
        {"residual": RESIDUAL.half()}, TypeError,
        "residual must be torch.float32 like x, got torch.float16"),
    "residual has other columns": (
        {"residual": RESIDUAL[:, :9]}, ValueError, "residual must be [3, 10], got [3, 9]"),
    "residual has other rows": (
        {"residual": RESIDUAL[:1]}, ValueError, "residual must be [3, 10], got [1, 10]"),
    "residual is elsewhere": (
        {"residual": RESIDUAL.to("meta")}, ValueError,
        "residual must be on cpu like x, got meta"),
    "swiglu with a residual": (
        {"residual": RESIDUAL, "swiglu": True}, ValueError,
        "residual must be None with swiglu, got a tensor [3, 10]"),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("what", WRONG)
def test_message(what, backend):
    options, kind, message = WRONG[what]
    with pytest.raises(kind, match=re.escape(message)):
        linear(X, **({"weight": W, "backend": backend} | options))


def composed(x, w, norm=None, swiglu_=False, residual=None, backend=None):
    if norm is not None:
        x = rms_norm(x, norm, backend=backend)
    y = linear(x, w, backend=backend)
    if swiglu_:
        y = swiglu(y, backend=backend)
    return y if residual is None else residual + y


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not optional_kernel("linear_fused", b)])
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("form", FORMS)
def test_composed_it_has_the_bits_of_one_after_the_other(form, rows, backend):
    x, w = torch.randn(rows, 64).bfloat16(), compressed(form, W.bfloat16())
    norm, residual = NORM.bfloat16(), torch.randn(rows, 10).bfloat16()
    options = {"backend": backend}
    got = linear(x, w, norm=norm, residual=residual, **options)
    assert torch.equal(got, composed(x, w, norm, residual=residual, **options))
    got = linear(x, w, norm=norm, swiglu=True, **options)
    assert torch.equal(got, composed(x, w, norm, True, **options))


@every_backend
@pytest.mark.parametrize("rows", [3, 9])
def test_gradients_reach_every_tensor(rows, backend):
    leaves = [torch.randn(rows, 64), W.clone(), NORM.clone(), torch.randn(rows, 10)]
    x, w, norm, residual = (t.requires_grad_() for t in leaves)
    linear(x, w, norm=norm, residual=residual, backend=backend).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in leaves)
    linear(x.detach(), AFFINE, norm=norm, swiglu=True, backend=backend).sum().backward()


@every_backend
@pytest.mark.parametrize("form", FORMS)
def test_it_is_traced_whole(form, backend):
    x, w = torch.randn(3, 64).bfloat16(), compressed(form, W.bfloat16())
    options = {"norm": NORM.bfloat16(), "backend": backend}
    around = {"residual": RESIDUAL.bfloat16()}, {"swiglu": True}
    torch.compiler.reset()

    def both(x):
        fused = [linear(x, w, **options, **each) + 1 for each in around]
        return [linear(x, w, backend=backend) + 1, *fused]

    traced = torch.compile(both, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert all(map(torch.equal, traced(x), both(x)))


def test_only_the_backends_that_are_named_have_the_kernel():
    for backend in runnable("linear"):
        has = optional_kernel("linear_fused", backend) is not None
        assert has == (backend == "triton")
        assert optional_kernel("linear_fwd", backend)
    assert not optional_kernel("linear_fused", "reference")
