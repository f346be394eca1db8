"""Wrong arguments are refused: the message names them, what was expected and what was got. Those
of weights and of whole decoders are in test_weight_errors.py.
"""

import re

import pytest
import torch

from elmkernels import add_rms_norm, attention, qk_norm_rope, rms_norm, rope_table, swiglu
from elmkernels.backends import BACKENDS
from elmkernels.testing import runnable

X = torch.randn(2, 3, 64)
W = torch.rand(64)
QKV = torch.randn(2, 5, 6 * 64)
POSITIONS = torch.arange(5)
TABLE = rope_table(16, 64)
CACHE = torch.randn(2, 9, 1, 64)
SLOTS = torch.arange(5)
Q, K = torch.randn(2, 5, 4, 64), torch.randn(2, 7, 2, 64)


def qk(
    qkv=QKV, q_weight=W, k_weight=W, positions=POSITIONS, q_heads=4, kv_heads=1, table=TABLE, **k
):
    return qk_norm_rope(qkv, q_weight, k_weight, positions, q_heads, kv_heads, table, **k)


def cached(k_cache=CACHE, v_cache=CACHE, slots=SLOTS, **kwargs):
    return qk(k_cache=k_cache, v_cache=v_cache, slots=slots, **kwargs)


WRONG = {
    "x is a list": (
        lambda: rms_norm([1.0], W),
        TypeError, "x must be a tensor, got list"),
    "x is float64": (
        lambda: rms_norm(X.double(), W),
        TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
    "x is a scalar": (
        lambda: rms_norm(torch.tensor(1.0), W),
        ValueError, "x must have at least one dimension, got a scalar"),
    "x is on meta": (
        lambda: rms_norm(X.to("meta"), W.to("meta")),
        RuntimeError, "rms_norm runs on cpu or cuda, got a tensor on meta"),
    "weight is on meta": (
        lambda: rms_norm(X, W.to("meta")),
        ValueError, "weight must be on cpu like x, got meta"),
    "weight has a wrong length": (
        lambda: rms_norm(X, W[:32]),
        ValueError, "weight must be [64], got [32]"),
    "weight is two-dimensional": (
        lambda: rms_norm(X, W[None]),
        ValueError, "weight must be [64], got [1, 64]"),
    "weight is narrower than x": (
        lambda: rms_norm(X, W.half()),
        TypeError, "weight must be torch.float32 like x, or torch.float32, got torch.float16"),
    "weight is of the other half type": (
        lambda: rms_norm(X.half(), W.bfloat16()),
        TypeError, "weight must be torch.float16 like x, or torch.float32, got torch.bfloat16"),
    "weight is None": (
        lambda: rms_norm(X, None),
        TypeError, "weight must be a tensor, got NoneType"),
    "residual has another shape": (
        lambda: add_rms_norm(X, X[:1], W),
        ValueError, "residual must be [2, 3, 64], got [1, 3, 64]"),
    "residual has another dtype": (
        lambda: add_rms_norm(X, X.half(), W),
        TypeError, "residual must be torch.float32 like x, got torch.float16"),
    "residual is None": (
        lambda: add_rms_norm(X, None, W),
        TypeError, "residual must be a tensor, got NoneType"),
    "gate_up is odd": (
        lambda: swiglu(X[..., :63]),
        ValueError, "gate_up must be [..., 2n], got [2, 3, 63]"),
    "gate_up is int": (
        lambda: swiglu(X.int()),
        TypeError, "gate_up must be float32, bfloat16 or float16, got torch.int32"),
    "qkv has too few columns": (
        lambda: qk(QKV[..., :64]),
        ValueError, "qkv must be [batch, length, 384] (4 + 2 x 1 heads of 64), got [2, 5, 64]"),
    "qkv is one-dimensional": (
        lambda: qk(QKV[0, 0]),
        ValueError, "qkv must be [batch, length, 384] (4 + 2 x 1 heads of 64), got [384]"),
    "q_heads is zero": (
        lambda: qk(q_heads=0),
        ValueError, "q_heads must be a positive integer, got 0"),
    "kv_heads is a float": (
        lambda: qk(kv_heads=1.0),
        ValueError, "kv_heads must be a positive integer, got 1.0"),
    "rope_table is half": (
        lambda: qk(table=TABLE.half()),
        ValueError, "rope_table must be float32 [length, even head_dim], got torch.float16"),
    "rope_table is odd": (
        lambda: qk(table=TABLE[:, :63]),
        ValueError, "rope_table must be float32 [length, even head_dim], got torch.float32"),
    "rope_table is on meta": (
        lambda: qk(table=TABLE.to("meta")),
        ValueError, "rope_table must be on cpu like qkv, got meta"),
    "only one weight": (
        lambda: qk(k_weight=None),
        ValueError, "k_weight must be given exactly when q_weight is, got only one of them"),
    "q_weight has a wrong length": (
        lambda: qk(q_weight=W[:32]),
        ValueError, "q_weight must be [64], got [32]"),
    "weights of two dtypes": (
        lambda: qk(QKV.half(), q_weight=W.half()),
        TypeError, "k_weight must be torch.float16 like q_weight, got torch.float32"),
    "positions are int32": (
        lambda: qk(positions=POSITIONS.int()),
        TypeError, "positions must be torch.int64, got torch.int32"),
    "positions don't broadcast": (
        lambda: qk(positions=torch.arange(4)),
        ValueError, "positions must be broadcastable to [2, 5], got [4]"),
    "positions are a list": (
        lambda: qk(positions=[0, 1, 2, 3, 4]),
        TypeError, "positions must be a tensor, got list"),
    "a cache without slots": (
        lambda: qk(k_cache=CACHE, v_cache=CACHE),
        ValueError, "k_cache, v_cache and slots must be given together, got k_cache or slots as"),
    "slots without caches": (
        lambda: qk(slots=SLOTS),
        ValueError, "k_cache, v_cache and slots must be given together, got k_cache or slots as"),
    "the cache has another dtype": (
        lambda: cached(k_cache=CACHE.half()),
        TypeError, "k_cache must be torch.float32 on cpu like qkv, got torch.float16 on cpu"),
    "the cache has other heads": (
        lambda: cached(v_cache=torch.randn(2, 9, 2, 64)),
        ValueError, "v_cache must be [2, 9, 1, 64], got [2, 9, 2, 64]"),
    "the caches have two lengths": (
        lambda: cached(v_cache=CACHE[:, :8]),
        ValueError, "v_cache must be [2, 9, 1, 64] like k_cache, got [2, 8, 1, 64]"),
    "a cache for packed tokens": (
        lambda: cached(qkv=QKV[0]),
        ValueError, "qkv must be [batch, length, width] when a cache is written, got [5, 384]"),
    "slots are int32": (
        lambda: cached(slots=SLOTS.int()),
        TypeError, "slots must be torch.int64, got torch.int32"),
    "slots don't broadcast": (
        lambda: cached(slots=torch.arange(3)),
        ValueError, "slots must be broadcastable to [2, 5], got [3]"),
    "a cache for a leaf": (
        lambda: cached(qkv=QKV.clone().requires_grad_()),
        RuntimeError, "qkv and the weights must not require a gradient when a cache is written"),
    "a cache for trained weights": (
        lambda: cached(q_weight=W.clone().requires_grad_()),
        RuntimeError, "qkv and the weights must not require a gradient when a cache is written"),
    "q is three-dimensional": (
        lambda: attention(Q[0], K, K),
        ValueError, "q must be [batch, length, q_heads, head_dim], got [5, 4, 64]"),
    "k has another head_dim": (
        lambda: attention(Q, K[..., :32], K[..., :32]),
        ValueError, "k must be [2, length, kv_heads, 64], got [2, 7, 2, 32]"),
    "v has another shape": (
        lambda: attention(Q, K, K[:, :6]),
        ValueError, "v must be [2, 7, 2, 64] like k, got [2, 6, 2, 64]"),
    "k is shorter than q": (
        lambda: attention(Q, K[:, :4], K[:, :4]),
        ValueError, "k must be at least as long as q (5), got 4"),
    "heads don't divide": (
        lambda: attention(Q[:, :, :3], K, K),
        ValueError, "q must be of a multiple of 2 heads (those of k), got 3"),
    "the mask has another length": (
        lambda: attention(Q, K, K, key_mask=torch.ones(2, 5, dtype=torch.bool)),
        ValueError, "key_mask must be bool [2, 7], got torch.bool [2, 5]"),
    "offsets are int32": (
        lambda: attention(Q, K, K, offsets=torch.zeros(2, dtype=torch.int32)),
        TypeError, "offsets must be torch.int64, got torch.int32"),
    "offsets have another length": (
        lambda: attention(Q, K, K, offsets=torch.zeros(3, dtype=torch.int64)),
        ValueError, "offsets must be [2], got [3]"),
    "offsets are on meta": (
        lambda: attention(Q, K, K, offsets=torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError, "offsets must be on cpu, got meta"),
    "the scale is negative": (
        lambda: attention(Q, K, K, scale=-0.1),
        ValueError, "scale must be above 0, got -0.1"),
    "sdpa for a norm": (
        lambda: rms_norm(X, W, backend="sdpa"),
        RuntimeError, "backend 'sdpa' has no kernels for rms_norm"),
    "an unknown backend": (
        lambda: rms_norm(X, W, backend="mps"),
        ValueError, f"backend must be one of {', '.join(BACKENDS)}, got 'mps'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_message(what):
    call, kind, message = WRONG[what]
    with pytest.raises(kind, match=re.escape(message)) as raised:
        call()
    assert type(raised.value) is kind


MISSING = [name for name, backend in BACKENDS.items() if backend.missing is not None]


@pytest.mark.parametrize("backend", MISSING)
def test_a_backend_that_cannot_run_here_says_why_and_never_falls_back(backend):
    reason = re.escape(BACKENDS[backend].missing)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' can't run here: {reason}"):
        rms_norm(X, W, backend=backend)


def test_a_backend_of_another_device_is_refused():
    backend = (runnable("swiglu") or ["reference"])[0]
    with pytest.raises(RuntimeError, match="got a tensor on meta"):
        swiglu(X.to("meta"), backend=backend)


# Triton, interpreted on a CPU as on a GPU, answers a bad position with NaN: no check there.
CHECKED = [name for name in (*runnable("qk_norm_rope"), "reference") if name != "triton"]


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("bad", [-1, 16, 2**40])
def test_a_position_outside_the_table_is_refused(backend, bad):
    positions = torch.tensor([0, 1, bad, 3, 4])
    with pytest.raises(ValueError, match=rf"positions must be in \[0, 16\).*{bad}"):
        qk(positions=positions, backend=backend)
    with pytest.raises(ValueError, match=rf"positions must be in \[0, 16\).*{bad}"):
        cached(positions=positions, backend=backend)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("bad", [-1, 9])
def test_a_slot_outside_the_cache_is_refused_before_anything_is_written(backend, bad):
    k_cache, v_cache = CACHE.clone(), CACHE.clone()
    slots = torch.tensor([0, 1, 2, 3, bad])
    with pytest.raises(ValueError, match=rf"slots must be in \[0, 9\).*{bad}"):
        cached(k_cache, v_cache, slots, backend=backend)
    assert torch.equal(k_cache, CACHE)
    assert torch.equal(v_cache, CACHE)


@pytest.mark.parametrize("backend", [*runnable("attention"), "reference"])
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_an_offset_outside_the_cache_is_refused(backend, bad):
    with pytest.raises(ValueError, match=rf"offsets must be in \[0, 3\).*{bad}"):
        attention(Q, K, K, offsets=torch.tensor([0, bad]), backend=backend)
