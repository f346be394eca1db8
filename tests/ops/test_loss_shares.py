"""linear_cross_entropy_add: shares of a gradient, added in float32 and rounded once."""

import itertools
import math

import pytest
import torch

from elmkernels import linear_cross_entropy
from elmkernels.backends import BACKENDS as ALL_BACKENDS
from elmkernels.backends import kernel, optional_kernel
from elmkernels.ops import _chunked_loss
from elmkernels.testing import runnable

BACKENDS = runnable("linear_cross_entropy")
ADDING = [name for name in BACKENDS if optional_kernel("linear_cross_entropy_add", name)]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", ADDING)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 1280])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_shares_are_added_in_float32_and_rounded_once(backend, width, scale):
    """To the bit, with rows that lie apart, beside what must stay; a fresh sum isn't read."""
    add = kernel("linear_cross_entropy_add", backend)
    factor = None if scale is None else torch.tensor(scale)
    for to, of in itertools.product(FLOATS, FLOATS):
        wide, share = torch.randn(90, width + 3).to(to), torch.randn(90, 2 * width).to(of)
        total, share = wide[:, 1:-2], share[:, ::2] if width == 1 else share[:, width:]
        scaled = share.float() if scale is None else share.float() * factor
        expected = (total.float() + scaled).to(to)
        margin = wide[:, [0, -2, -1]].clone()
        assert add(total, share, factor, False) is None
        assert torch.equal(total, expected)
        total.fill_(math.nan)
        add(total, share, factor, True)
        assert torch.equal(total, scaled.to(to))
        assert torch.equal(wide[:, [0, -2, -1]], margin)


@pytest.mark.parametrize("backend", ADDING)
def test_infinite_shares_and_empty_ones_are_added_too(backend):
    add = kernel("linear_cross_entropy_add", backend)
    total = torch.zeros(2, 3)
    add(total, torch.tensor([[math.inf, -math.inf, math.nan], [1, 2, 3]]).bfloat16(), None, False)
    assert total[0, :2].tolist() == [math.inf, -math.inf]
    assert total[0, 2].isnan()
    assert total[1].tolist() == [1, 2, 3]
    for shape in ((0, 5), (5, 0)):
        add(torch.zeros(shape), torch.zeros(shape).bfloat16(), None, True)


def test_a_backend_may_do_without_a_kernel():
    """The dispatch knows of none then, and whoever asks for it regardless is stopped."""
    assert "triton" in ALL_BACKENDS
    assert optional_kernel("linear_cross_entropy_rows", "triton") is not None
    assert optional_kernel("linear_cross_entropy_add", "triton") is None
    with pytest.raises(KeyError):
        kernel("linear_cross_entropy_add", "triton")


@pytest.mark.parametrize("backend", ADDING)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_one_chunk_of_bfloat16_is_not_summed_in_float32(backend, reduction, ignored, monkeypatch):
    """Nothing is added to its dweight: the same bits, without a float32 copy of them."""
    generator, made = torch.Generator().manual_seed(0), []
    hidden, weight = (
        torch.randn(n, 24, generator=generator).bfloat16().requires_grad_() for n in (37, 131)
    )
    targets = torch.randint(131, (37,), generator=generator)
    targets[torch.rand(37, generator=generator) < ignored] = -100

    def run() -> tuple[torch.Tensor, ...]:
        how = {"reduction": reduction, "backend": backend}
        loss = linear_cross_entropy(hidden, weight, targets, **how)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.7))

    one, all_parts = _chunked_loss.sum_dtype, _chunked_loss.parts_of
    monkeypatch.setattr(
        _chunked_loss, "parts_of", lambda *a, **k: made.append(a[2]) or all_parts(*a, **k)
    )
    found = run()
    monkeypatch.setattr(_chunked_loss, "sum_dtype", lambda h, w, alone: one(h, w, False))
    expected = run()
    monkeypatch.setattr(_chunked_loss, "sum_dtype", one)
    monkeypatch.setitem(_chunked_loss.CHUNK_BYTES, "cpu", 8 * 131 * 2)
    run()
    assert made == [torch.bfloat16, torch.float32, torch.float32]
    assert all(map(torch.equal, found, expected))
