"""attention over varlen documents: what it refuses, and that a document never meets another."""

import re

import pytest
import torch

from elmkernels import attention
from elmkernels.testing import runnable

BACKENDS = [*runnable("attention"), "reference"]
KERNELS = [name for name in BACKENDS if name not in ("sdpa", "reference", "triton")]
Q, K = torch.randn(1, 8, 4, 64), torch.randn(1, 8, 2, 64)

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def ends(*numbers, dtype=torch.int64, **kwargs):
    return torch.tensor(numbers, dtype=dtype, **kwargs)


WRONG = {
    "a list": (
        lambda b: attention(Q, K, K, cu_seqlens=[0, 8], backend=b),
        TypeError, "cu_seqlens must be a tensor, got list"),
    "int32": (
        lambda b: attention(Q, K, K, cu_seqlens=ends(0, 8, dtype=torch.int32), backend=b),
        TypeError, "cu_seqlens must be torch.int64, got torch.int32"),
    "two-dimensional": (
        lambda b: attention(Q, K, K, cu_seqlens=ends(0, 8)[None], backend=b),
        ValueError, "cu_seqlens must be [documents + 1], got [1, 2]"),
    "no number": (
        lambda b: attention(Q, K, K, cu_seqlens=ends(), backend=b),
        ValueError, "cu_seqlens must be [documents + 1], got [0]"),
    "on meta": (
        lambda b: attention(Q, K, K, cu_seqlens=ends(0, 8, device="meta"), backend=b),
        ValueError, "cu_seqlens must be on cpu, got meta"),
    "two rows": (
        lambda b: attention(Q.view(2, 4, 4, 64), K.view(2, 4, 2, 64), K.view(2, 4, 2, 64),
                            cu_seqlens=ends(0, 4), backend=b),
        ValueError, "q must be [1, 4, ...] with cu_seqlens: one row, like k, got [2, 4, 4, 64]"),
    "more keys": (
        lambda b: attention(Q[:, :5], K, K, cu_seqlens=ends(0, 5), backend=b),
        ValueError, "q must be [1, 8, ...] with cu_seqlens: one row, like k, got [1, 5, 4, 64]"),
    "a mask": (
        lambda b: attention(Q, K, K, cu_seqlens=ends(0, 8), backend=b,
                            key_mask=torch.ones(1, 8, dtype=torch.bool)),
        ValueError, "key_mask must be None with cu_seqlens, got a tensor [1, 8]"),
    "offsets": (
        lambda b: attention(Q, K, K, cu_seqlens=ends(0, 8), offsets=ends(0), backend=b),
        ValueError, "offsets must be None with cu_seqlens, got a tensor [1]"),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("what", WRONG)
def test_message(what, backend):
    call, kind, message = WRONG[what]
    with pytest.raises(kind, match=re.escape(message)):
        call(backend)


@every_backend
@pytest.mark.parametrize(
    ("numbers", "got"),
    [((1, 8), "1 to 8"), ((0, 7), "0 to 7"), ((0, 9), "0 to 9"), ((0,), "0 to 0"),
     ((0, 5, 3, 8), "5 before 3"), ((0, 2**40, 8), f"{2**40} before 8"),
     ((0, -1, 8), "0 before -1")],
)  # fmt: skip
def test_documents_that_do_not_fill_the_row_are_refused(numbers, got, backend):
    message = re.escape(f"cu_seqlens must be rising from 0 to 8, got {got}")
    with pytest.raises(ValueError, match=message):
        attention(Q, K, K, cu_seqlens=ends(*numbers), backend=backend)


def run(backend, cu_seqlens, *leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = attention(*leaves[:3], cu_seqlens=cu_seqlens, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves[:3], leaves[3].detach())]


def drawn(total, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, total, heads, 64) for heads in (4, 2, 2, 4))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_is_bitwise_what_it_is_alone(backend, dtype):
    lengths = [70, 1, 0, 150, 9]
    tensors = drawn(sum(lengths), dtype)
    whole = run(backend, ends(0, *torch.tensor(lengths).cumsum(0).tolist()), *tensors)
    split = zip(*(t.split(lengths, dim=1) for t in whole), strict=True)
    parts = zip(*(t.split(lengths, dim=1) for t in tensors), strict=True)
    for document, part in zip(split, parts, strict=True):
        if part[0].shape[1]:
            alone = run(backend, None, *part)
            assert all(torch.equal(a, b) for a, b in zip(document, alone, strict=True))


# Not the reference's: it multiplies a NaN by the weight 0 of a masked key.
@pytest.mark.parametrize("backend", runnable("attention"))
def test_what_is_not_finite_stays_in_its_document(backend):
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    tensors = drawn(40, dtype)
    cu_seqlens = ends(0, 13, 30, 40)
    clean = run(backend, cu_seqlens, *tensors)
    for t in tensors:
        t[:, 13:30] = float("nan")
    got = run(backend, cu_seqlens, *tensors)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[:, :13], b[:, :13])
        assert torch.equal(a[:, 30:], b[:, 30:])
        assert not a[:, 13:30].isfinite().any()


@every_backend
def test_strided_numbers_are_read(backend):
    q, k, v, _ = drawn(40, torch.float32)
    cu_seqlens = ends(0, 13, 30, 40)
    strided = torch.stack((cu_seqlens, cu_seqlens - 7), dim=1)[:, 0]
    got = attention(q, k, v, cu_seqlens=strided, backend=backend)
    assert torch.equal(got, attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_packed_inputs_are_read_where_they_lie_and_no_mask_is_made(backend):
    qkv = torch.randn(1, 60, 8, 64)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    cu_seqlens = ends(0, 20, 60)
    attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)
    seen = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert seen <= {"aten::new_empty", "aten::empty"}
