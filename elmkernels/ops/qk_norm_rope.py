"""qk_norm_rope: split the fused projection q | k | v, RMS-normalize q and k, rotate both.

For a head x of q or k: u = round(x * rstd) * weight, then on its halves (a, b)
    y = round(a cos - b sin), round(b cos + a sin), in float32 between the roundings.
v stays where it is: the result is a view. With a cache, k and v go straight to its slots.

Backward rotates by the opposite angle, du = (dy_a cos + dy_b sin, dy_b cos - dy_a sin), then is
rms_norm's over each head; dv is copied. Only qkv, the weights and the positions are saved.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, Traits, define, kernel, rows_backend
from ..checks import last_dim_contiguous, number, within
from ..derivatives import Derivative, once, unusual
from ._flops import counted
from ._qk_checks import check_heads, checked_cache, wants_gradient

_INPUTS = (
    "Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor positions, Tensor rope_table, "
    "int q_heads, int kv_heads, float eps"
)


def _heads(qkv, heads, rope_table):
    return qkv.new_empty((*qkv.shape[:2], heads, rope_table.shape[1]))


def _fake_bwd(dq, dk, dv, qkv, q_weight, k_weight, positions, rope_table, eps):
    dweights = (
        qkv.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight)
    )
    return qkv.new_empty(qkv.shape), *dweights


define(
    "qk_norm_rope",
    backends=(*CPU, "cuda", "triton"),
    traits=Traits(by_rows=True),
    fwd=(
        f"({_INPUTS}) -> (Tensor, Tensor)",
        lambda qkv, qw, kw, positions, table, q_heads, kv_heads, eps: (
            _heads(qkv, q_heads, table),
            _heads(qkv, kv_heads, table),
        ),
    ),
    cache=(
        f"({_INPUTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> Tensor",
        lambda qkv, qw, kw, positions, table, q_heads, *_: _heads(qkv, q_heads, table),
    ),
    bwd=(
        "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
        "Tensor positions, Tensor rope_table, float eps) -> (Tensor, Tensor, Tensor)",
        _fake_bwd,
    ),
)
counted("qk_norm_rope")


class _QKNormRope(Derivative):
    op = "qk_norm_rope"

    @staticmethod
    def forward(qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps, backend):
        q, k = kernel("qk_norm_rope_fwd", backend)(
            qkv, q_weight, k_weight, positions, table, q_heads, kv_heads, eps
        )
        return q, k, _values(qkv, kv_heads, table.shape[1])

    @staticmethod
    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.eps, ctx.backend = inputs[7:]

    @staticmethod
    def backward(ctx, *cotangents):
        _, q_weight, k_weight, *_ = saved = ctx.saved_tensors
        bwd, cotangents = (
            kernel("qk_norm_rope_bwd", ctx.backend),
            map(last_dim_contiguous, cotangents),
        )
        dqkv, dq_weight, dk_weight = once("qk_norm_rope", bwd, *cotangents, *saved, ctx.eps)
        dq_weight = None if q_weight is None else dq_weight
        dk_weight = None if k_weight is None else dk_weight
        return dqkv, dq_weight, dk_weight, None, None, None, None, None, None


def _values(qkv: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    return qkv.narrow(-1, qkv.shape[-1] - kv_heads * head_dim, kv_heads * head_dim).unflatten(
        -1, (kv_heads, head_dim)
    )


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    q_heads: int,
    kv_heads: int,
    rope_table: Tensor,
    *,
    eps: float = 1e-6,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From qkv_proj's output to the rotated queries and keys of one layer, in one pass.

    With k_cache, v_cache and slots, k and v are written there, without gradients.

    Args:
        qkv: [batch, length, (q_heads + 2 kv_heads) head_dim] or [tokens, ...], columns q | k | v;
            float32, bfloat16 or float16, any strides.
        q_weight: [head_dim] in qkv's dtype or float32: the weight of the queries' RMS norm; None,
            as k_weight then is, for no norm.
        k_weight: the same of the keys.
        positions: int64, broadcastable to qkv's dimensions without the last: one a token.
        q_heads: how many heads ask.
        kv_heads: how many heads of keys, and of values.
        rope_table: float32 [table_length, head_dim] of `rope_table`.
        eps: of the norms.
        k_cache: [batch, max_length, kv_heads, head_dim] in qkv's dtype, written in place.
        v_cache: like k_cache.
        slots: int64, broadcastable to [batch, length]: each token's place along max_length.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        (q, k, v): q [..., q_heads, head_dim], k and v [..., kv_heads, head_dim]. v is a view of
        qkv. With a cache k and v are k_cache and v_cache themselves.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device. A position
            outside the table raises on a CPU alone: on a GPU its q and k are NaN.
        RuntimeError: the named backend can't run here, or a gradient is wanted through a cache.

    Example:
        >>> qkv, weight = torch.randn(1, 5, (4 + 2 * 2) * 16), torch.ones(16)
        >>> table = elmkernels.rope_table(5, 16)
        >>> q, k, v = elmkernels.qk_norm_rope(qkv, weight, weight, torch.arange(5), 4, 2, table)
        >>> q.shape, k.shape
        (torch.Size([1, 5, 4, 16]), torch.Size([1, 5, 2, 16]))
    """
    check_heads(qkv, q_weight, k_weight, positions, q_heads, kv_heads, rope_table)
    number("eps", eps)
    cache, flat = None, qkv.dim() == 2
    if k_cache is not None or v_cache is not None or slots is not None:
        cache = checked_cache(
            qkv, q_weight, k_weight, kv_heads, rope_table, k_cache, v_cache, slots
        )
    backend = rows_backend("qk_norm_rope", backend, qkv, q_weight, k_weight)
    if backend == REFERENCE:
        return _by_reference(
            qkv, q_weight, k_weight, positions, q_heads, kv_heads, rope_table, eps, cache
        )
    qkv = last_dim_contiguous(qkv)
    if flat:
        qkv = qkv.unsqueeze(0)
    if positions.shape != qkv.shape[:2]:
        positions = positions.expand(qkv.shape[:2])
    inputs = (qkv, q_weight, k_weight, positions, rope_table, q_heads, kv_heads, eps)
    if cache is not None:
        k_cache, v_cache, slots = cache
        slots = slots.expand(qkv.shape[:2])
        q = kernel("qk_norm_rope_cache", backend)(*inputs, k_cache, v_cache, slots)
        return q, k_cache, v_cache
    if (special := unusual()) or wants_gradient(qkv, q_weight, k_weight):
        q, k, v = (_QKNormRope.transformed if special else _QKNormRope.apply)(*inputs, backend)
    else:
        q, k = kernel("qk_norm_rope_fwd", backend)(*inputs)
        v = _values(qkv, kv_heads, rope_table.shape[1])
    return (q[0], k[0], v[0]) if flat else (q, k, v)


def _by_reference(
    qkv, q_weight, k_weight, positions, q_heads, kv_heads, table, eps, cache
) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        within("positions", positions, table.shape[0], "rope_table's length")
    q, k, v = reference.qk_norm_rope(
        qkv, q_weight, k_weight, positions, q_heads, kv_heads, table, eps
    )
    if cache is None:
        return q, k, v
    k_cache, v_cache, slots = cache
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        within("slots", slots, k_cache.shape[1], "the cache's length")
    index = slots.expand(qkv.shape[:2])[..., None, None].expand(k.shape)
    k_cache.scatter_(1, index, k)
    v_cache.scatter_(1, index, v)
    return q, k_cache, v_cache
