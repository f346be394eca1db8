"""What attention promises beyond numbers: tracing, threads, strides, rows that see nothing."""

import pytest
import torch
from helpers.calls import assert_same, inputs, run

from elmkernels import attention
from elmkernels.backends import kernel, of_dtype
from elmkernels.testing import runnable


def test_attention_never_repeats_keys_and_matches_a_cache_of_any_length():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 8, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    whole = attention(q, k, v)
    for lq in (1, 4):
        torch.testing.assert_close(attention(q[:, -lq:], k, v), whole[:, -lq:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q[:, -1:], k, v)
    seen = {event.key for event in profile.key_averages()}
    assert "aten::repeat_interleave" not in seen
    assert "aten::clone" not in seen


KERNELS = [name for name in runnable("attention") if name != "sdpa"]
# Not Triton: its interpreter copies what it is given, knows no threads and truncates bfloat16.
ATTENTION = [name for name in KERNELS if name != "triton"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["chunk", "ragged_and_padded", "varlen_off_every_block"])
def test_attention_traces_and_passes_opcheck(backend, name):
    args, kwargs = inputs("attention", name, torch.float32)
    q, k, v = (a.detach().nan_to_num() for a in args)
    sight = (*(kwargs.get(name) for name in ("key_mask", "offsets", "cu_seqlens")), 0.125)
    fwd, bwd = (kernel(f"attention_{x}", of_dtype(backend, q.dtype)) for x in ("fwd", "bwd"))
    out, lse = fwd(q, k, v, *sight)
    torch.library.opcheck(fwd, (q, k, v, *sight))
    torch.library.opcheck(bwd, (torch.randn_like(out), q, k, v, out, lse, *sight))
    torch.compiler.reset()
    traced = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert_same(run(traced, args, backend, **kwargs), run(attention, args, backend, **kwargs))


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("name", ["long", "ragged_long", "varlen_long_among_short"])
def test_attention_is_bitwise_equal_with_any_number_of_threads(backend, name):
    args, kwargs = inputs("attention", name, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        first = run(attention, args, backend, **kwargs)
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            assert_same(run(attention, args, backend, **kwargs), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_row_does_not_depend_on_its_batch(backend, dtype):
    """Nor, beyond one tile, on where the tiles of queries begin."""
    args, kwargs = inputs("attention", "ragged_chunks", dtype)
    q, k, v = (a.detach() for a in args)
    offsets = kwargs["offsets"]
    whole = attention(q, k, v, offsets=offsets, backend=backend)
    assert whole.isfinite().all()
    for b, first in enumerate(offsets.tolist()):
        end = first + q.shape[1]
        alone = attention(q[b : b + 1], k[b : b + 1, :end], v[b : b + 1, :end], backend=backend)
        assert torch.equal(alone[0], whole[b])
        rest = attention(q[b : b + 1, -4:], k[b : b + 1, :end], v[b : b + 1, :end],
                         backend=backend)  # fmt: skip
        assert torch.equal(rest[0], whole[b, -4:])


@pytest.mark.parametrize("backend", ATTENTION)
def test_attention_reads_strided_inputs_where_they_lie(backend):
    args, _ = inputs("attention", "strided_prompt")
    q, k, v = (a.detach() for a in args)
    assert not any(t.is_contiguous() for t in (q, k, v))
    assert torch.equal(
        attention(q, k, v, backend=backend),
        attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend),
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v, backend=backend)
    seen = {event.key for event in profile.key_averages()}
    assert not seen & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to"}


@pytest.mark.parametrize("backend", KERNELS)
def test_attention_with_an_odd_last_stride_is_right(backend):
    args, _ = inputs("attention", "chunk")
    expected = run(attention, args, backend)
    spread = [torch.stack((a.detach(), a.detach()), dim=-1).flatten(-2) for a in args]
    got = run(attention, [s[..., ::2].requires_grad_() for s in spread], backend)
    assert_same(got, expected)


@pytest.mark.parametrize("backend", [*runnable("attention"), "reference"])
def test_a_query_that_sees_no_key_gives_zeros(backend):
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    out = attention(q, k, v, key_mask=mask, backend=backend)
    assert out[0].all()
    assert not out[1].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_query_that_sees_no_key_gives_no_gradient(backend):
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attention(*leaves, key_mask=mask, backend=backend).sum().backward()
    assert all(t.grad[0].any() and t.grad.isfinite().all() for t in leaves)
    assert not any(t.grad[1].any() for t in leaves)
