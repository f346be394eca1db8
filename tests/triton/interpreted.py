"""Triton's own corners, run by test_interpreted.py in an interpreted process."""

import pytest
import torch

from elmkernels import ops, reference
from elmkernels.backends import BACKENDS
from elmkernels.testing.cases.attention import attention_case
from elmkernels.testing.cases.draw import Case, grad
from elmkernels.testing.cases.qk_norm_rope import heads_case
from elmkernels.testing.parity import assert_parity
from elmkernels.triton import attention
from elmkernels.triton import qk_norm_rope as kernels

HALF = torch.float16


def randn(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_this_process_is_interpreted():
    assert BACKENDS["triton"].missing is None
    assert "cpu" in BACKENDS["triton"].devices


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_more_leading_dimensions_than_a_kernel_strides_through(op):
    def build(d):
        rows = [grad(d.normal(2, 3, 2, 5, 2, 48).permute(4, 1, 3, 0, 2, 5)) for _ in "ab"]
        return (*rows[: 1 + (op == "add_rms_norm")], d.weight(48)), {}

    assert_parity(op, Case(op, "five_dimensions", build), HALF, "triton")


def test_heads_of_enough_tokens_for_the_larger_tile():
    assert_parity("qk_norm_rope", heads_case("many", 12, 4, batch=1, length=260), HALF, "triton")


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "qk_norm_rope"])
def test_weight_gradients_are_the_same_bits_every_time(op):
    x, w = randn(300, 320), randn(64).requires_grad_()
    positions, table = torch.arange(300), reference.rope_table(300, 64)

    def gradients():
        if op == "qk_norm_rope":
            out = ops.qk_norm_rope(x, w, w, positions, 3, 1, table, backend="triton")[0]
        else:
            heads = x.unflatten(-1, (5, 64))
            rows = (heads,) if op == "rms_norm" else (heads, heads)
            out = getattr(ops, op)(*rows, w, backend="triton")
            out = out if op == "rms_norm" else out[0]
        return torch.autograd.grad(out, w, randn(*out.shape))[0]

    assert torch.equal(gradients(), gradients())


def attention_gradients(q, k, v, dout, **sight):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = ops.attention(*leaves, backend="triton", **sight)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("lq", [1, 40])
def test_attention_and_its_gradients_are_the_same_bits_every_time(lq):
    q, k, v = randn(2, lq, 6, 32), randn(2, 300, 2, 32), randn(2, 300, 2, 32).flip(1)
    offsets = torch.tensor([260, 100])
    first, second = (attention_gradients(q, k, v, q.flip(1), offsets=offsets) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lq", range(1, 9))
@pytest.mark.parametrize("ragged", [False, True])
def test_attention_of_few_queries_splits_the_keys(lq, ragged, monkeypatch):
    """Into parts that some rows, or all, leave empty; the results are the sum's all the same."""
    monkeypatch.setattr(attention, "splits_of", lambda *_: 4)
    offsets = [7, 97] if ragged else None
    case = attention_case("split", 3, 1, 20, lq, 97 + lq, 2, offsets=offsets)
    for dtype in (HALF, torch.float32):
        assert_parity("attention", case, dtype, "triton")


def test_split_keys_of_padded_rows(monkeypatch):
    monkeypatch.setattr(attention, "splits_of", lambda *_: 5)
    case = attention_case("split", 8, 2, 64, 2, 200, 3, padding=[0, 150, 198])
    assert_parity("attention", case, HALF, "triton")


def test_padding_is_never_read():
    q, k, v = randn(2, 5, 4, 16), randn(2, 40, 2, 16), randn(2, 40, 2, 16)
    real = torch.arange(40) % 3 != torch.tensor([[0], [1]])
    clean = attention_gradients(q, k, v, q.flip(1), key_mask=real)
    for t in (k, v):
        t[~real] = float("nan")
    got = attention_gradients(q, k, v, q.flip(1), key_mask=real)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("where", [-7, 2**40])
def test_offsets_and_documents_that_point_outside_read_nothing_there(where):
    q, k = randn(1, 4, 2, 16), randn(1, 9, 1, 16)
    out, lse = attention.attention_fwd(q, k, k, None, torch.tensor([where]), None, 0.25)
    attention.attention_bwd(q, q, k, k, out, lse, None, torch.tensor([where]), None, 0.25)
    ends = torch.tensor([0, where, 9])
    q = randn(1, 9, 2, 16)
    attention.attention_fwd(q, k, k, None, None, ends, 0.25)


def test_attention_over_tokens_farther_apart_than_int32_can_say():
    apart = 2**31 + 64
    memory = torch.empty(apart + 64, dtype=HALF)  # never touched between its two tokens
    x = memory.as_strided((1, 2, 2, 32), (0, apart, 32, 1))
    x.copy_(randn(1, 2, 2, 32))
    far = attention_gradients(x, x, x, x)
    near = attention_gradients(*(x.contiguous() for _ in "qkvg"))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_rows_farther_apart_than_int32_can_say():
    n, apart = 64, 2**31 + 64
    memory = torch.empty(apart + n, dtype=HALF)  # never touched between its two rows
    x = memory.as_strided((2, n), (apart, 1))
    x.copy_(randn(2, n))
    w = randn(n)
    assert torch.equal(
        ops.rms_norm(x, w, backend="triton"), ops.rms_norm(x.contiguous(), w, backend="triton")
    )
    both = ops.add_rms_norm(x, x, w, backend="triton")
    assert torch.equal(both[1], x + x)
    assert torch.equal(
        ops.swiglu(x, backend="triton"), ops.swiglu(x.contiguous(), backend="triton")
    )
    table = reference.rope_table(4, 16)
    inputs = (w[:16], w[:16], torch.arange(2), 2, 1, table)
    for ours, packed12 in zip(
        ops.qk_norm_rope(x, *inputs, backend="triton"),
        ops.qk_norm_rope(x.contiguous(), *inputs, backend="triton"),
        strict=True,
    ):
        assert torch.equal(ours, packed12)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_position_outside_the_table_is_nan_and_no_other(normalized):
    qkv, w = randn(1, 5, 6 * 16), randn(16) if normalized else None
    table = reference.rope_table(8, 16)
    positions = torch.tensor([[7, 8, -1, 2**62, 0]])
    bad = torch.tensor([False, True, True, True, False])
    q, k = kernels.qk_norm_rope_fwd(qkv, w, w, positions, table, 4, 1, 1e-6)
    for out, heads in ((q, slice(0, 4)), (k, slice(4, 5))):
        assert out[0, bad].isnan().all()
        assert out[0, ~bad].isfinite().all(), heads
    dq, dk, dv = randn(1, 5, 4, 16), randn(1, 5, 1, 16), randn(1, 5, 1, 16)
    dqkv, *_ = kernels.qk_norm_rope_bwd(dq, dk, dv, qkv, w, w, positions, table, 1e-6)
    dqkv = dqkv.view(1, 5, 6, 16)
    assert dqkv[0, bad, :5].isnan().all()
    assert dqkv[0, ~bad].isfinite().all()
    assert torch.equal(dqkv[:, :, 5:], dv)


def test_a_slot_outside_the_cache_is_not_written():
    qkv, w, table = randn(2, 3, 6 * 16), randn(16), reference.rope_table(8, 16)
    caches = [torch.full((2, 4, 1, 16), 7.0, dtype=HALF) for _ in "kv"]
    slots = torch.tensor([[0, 4, -1], [2**62, 3, 1]])
    positions = torch.arange(3).expand(2, 3)
    q = kernels.qk_norm_rope_cache(qkv, w, w, positions, table, 4, 1, 1e-6, *caches, slots)
    want_q, k = kernels.qk_norm_rope_fwd(qkv, w, w, positions, table, 4, 1, 1e-6)
    v = qkv.unflatten(-1, (6, 16))[:, :, 5:]
    assert torch.equal(q, want_q)
    for cache, source in zip(caches, (k, v), strict=True):
        want = torch.full((2, 4, 1, 16), 7.0, dtype=HALF)
        want[0, 0], want[1, 3], want[1, 1] = source[0, 0], source[1, 1], source[1, 2]
        assert torch.equal(cache, want)
