"""attention: softmax(scale q k^T) v, causal, grouped-query, over a cache of any length.

Scores, the softmax and every sum are float32; in bfloat16, where the processor multiplies pairs of
it, the weights are rounded before they meet v, as flash attention does. No mask is ever built, and
padding and what lies beyond a row's end are never read; of varlen documents no pair of two is
ever scored. Backward, from the saved lse,
    p = exp(scale q k^T - lse), dv = p^T dout, ds = p (dout v^T - rowsum(dout out)),
    dq = scale ds k, dk = scale ds^T q.
"""

import torch
from torch import Tensor

from .. import checks, reference
from ..backends import AMX, CPU, PREFERENCE, REFERENCE, SDPA, Traits, define, kernel
from ..checks import DTYPES, boundaries, fail, floating, integers, last_dim_contiguous, like, within
from ..derivatives import Derivative, once, unusual
from . import _flops
from ._attention_choice import REMEDY, attention_backend, kind_of
from ._sdpa import by_sdpa

_INPUTS = "Tensor q, Tensor k, Tensor v"
_SIGHT = "Tensor? key_mask, Tensor? offsets, Tensor? cu_seqlens, float scale"

define(
    "attention",
    backends=(*CPU, AMX, "triton", SDPA),
    traits=Traits(falls_back=True),
    order={"cuda": (SDPA, "triton")},  # of a prompt; for other calls see _attention_choice
    fwd=(
        f"({_INPUTS}, {_SIGHT}) -> (Tensor, Tensor)",
        lambda q, k, v, *_: (
            q.new_empty(q.shape),
            q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
        ),
    ),
    bwd=(
        f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_SIGHT}) -> (Tensor, Tensor, Tensor)",
        lambda dout, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
    ),
)
_flops.counted("attention", fwd=_flops.attention_fwd, bwd=_flops.attention_bwd)


class _Attention(Derivative):
    op, remedy = "attention", REMEDY

    @staticmethod
    def forward(q, k, v, key_mask, offsets, cu_seqlens, scale, backend):
        return kernel("attention_fwd", backend)(q, k, v, key_mask, offsets, cu_seqlens, scale)

    @staticmethod
    def keep(ctx, inputs, output):
        *sight, ctx.scale, ctx.backend = inputs[3:]
        ctx.save_for_backward(*inputs[:3], *output, *sight)
        ctx.mark_non_differentiable(output[1])  # lse

    @staticmethod
    def backward(ctx, dout, _):
        bwd, dout = kernel("attention_bwd", ctx.backend), last_dim_contiguous(dout)
        grads = once("attention", bwd, dout, *ctx.saved_tensors, ctx.scale, remedy=REMEDY)
        return *grads, None, None, None, None, None


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the shapes, dtypes and devices fit: all that a right call pays for."""
    if not (q.dim() == 4 and k.dim() == 4 and k.shape == v.shape and q.dtype in DTYPES):
        return False
    batch, lq, q_heads, head_dim = q.shape
    k_batch, lk, kv_heads, k_head_dim = k.shape
    return (
        k_batch == batch
        and k_head_dim == head_dim
        and lk >= lq
        and kv_heads > 0
        and q_heads % kv_heads == 0
        and k.dtype == q.dtype
        and v.dtype == q.dtype
        and k.device == q.device
        and v.device == q.device
    )


def _refuse(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Name what doesn't fit."""
    floating("q", q)
    like("k", k, "q", q)
    like("v", v, "q", q)
    if q.dim() != 4:
        fail("q", "[batch, length, q_heads, head_dim]", list(q.shape))
    batch, lq, q_heads, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        fail("k", f"[{batch}, length, kv_heads, {head_dim}]", list(k.shape))
    if v.shape != k.shape:
        fail("v", f"{list(k.shape)} like k", list(v.shape))
    if k.shape[1] < lq:
        fail("k", f"at least as long as q ({lq})", k.shape[1])
    fail("q", f"of a multiple of {k.shape[2]} heads (those of k)", q_heads)


def _check_sight(q: Tensor, k: Tensor, key_mask, offsets, cu_seqlens, scale, backend: str) -> None:
    """All but q, k and v; where offsets and cu_seqlens point, unless the kernel itself will look
    or it would wait for a GPU."""
    if key_mask is not None:
        checks.mask("key_mask", key_mask, k.shape[:2])
    if scale is not None:
        checks.number("scale", scale, above=0)
    looks = backend in PREFERENCE["cpu"] and backend != SDPA and q.numel() > 0
    read = q.device.type == "cpu" and not looks and not torch.compiler.is_compiling()
    if offsets is not None:
        integers("offsets", offsets, q.device)
        if offsets.shape != q.shape[:1]:
            fail("offsets", list(q.shape[:1]), list(offsets.shape))
        if read:
            within("offsets", offsets, k.shape[1] - q.shape[1] + 1, "k's length less q's")
    if cu_seqlens is not None:
        for name, other in (("key_mask", key_mask), ("offsets", offsets)):
            if other is not None:
                fail(name, "None with cu_seqlens", f"a tensor {list(other.shape)}")
        integers("cu_seqlens", cu_seqlens, q.device)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            fail("cu_seqlens", "[documents + 1]", list(cu_seqlens.shape))
        if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
            fail("q", f"[1, {k.shape[1]}, ...] with cu_seqlens: one row, like k", list(q.shape))
        if read:
            boundaries("cu_seqlens", cu_seqlens, q.shape[1])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal grouped-query attention: query i of row b sees the keys 0 to offsets[b] + i.

    Args:
        q: [batch, lq, q_heads, head_dim] float32, bfloat16 or float16, any strides.
        k: [batch, lk, kv_heads, head_dim] like q, with lk >= lq; kv_heads divides q_heads.
        v: like k.
        key_mask: bool [batch, lk], False for padding, which nothing sees; None for none.
        offsets: int64 [batch], each in [0, lk - lq]: the place among the keys of a row's first
            query; what lies beyond its last query may be anything. None: lk - lq in every row.
        cu_seqlens: int64 [documents + 1], rising from 0 to lk: one row (batch 1, lq == lk, without
            key_mask and offsets) holds documents one after another, document d from cu_seqlens[d]
            up to cu_seqlens[d + 1]. A query sees the keys of its own document up to itself.
        scale: what scores are multiplied by, above 0; None for head_dim^-0.5.
        backend: a backend by its name, which never falls back; None for the best of this call.

    Returns:
        [batch, lq, q_heads, head_dim] in q's dtype; zeros for a query that sees no key.
        Differentiable by q, k and v.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; offsets
            and cu_seqlens that point outside the keys raise on a CPU alone.
        RuntimeError: the named backend can't run here.

    Example:
        >>> q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
        >>> elmkernels.attention(q, k, k).shape
        torch.Size([1, 5, 4, 16])
        >>> documents = torch.tensor([0, 2, 5])
        >>> out = elmkernels.attention(q, k, k, cu_seqlens=documents)
    """
    if not all(isinstance(t, Tensor) for t in (q, k, v)) or not _fits(q, k, v):
        _refuse(q, k, v)
    kind = kind_of(q.shape[1], k.shape[1], key_mask, offsets, cu_seqlens)
    backend = attention_backend(q.device.type, backend, kind, q.shape[3], q.dtype)
    plain = key_mask is None and offsets is None and cu_seqlens is None
    if not plain or scale is not None:
        _check_sight(q, k, key_mask, offsets, cu_seqlens, scale, backend)
        key_mask = None if key_mask is None else key_mask.bool()
        cu_seqlens = None if cu_seqlens is None else last_dim_contiguous(cu_seqlens)
    if backend == REFERENCE or q.numel() == 0:
        return reference.attention(q, k, v, key_mask, scale, offsets, cu_seqlens)
    if backend == SDPA:
        return by_sdpa(q, k, v, key_mask, offsets, cu_seqlens, scale)
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    sight = key_mask, offsets, cu_seqlens, q.shape[3] ** -0.5 if scale is None else scale
    if unusual():
        return _Attention.transformed(q, k, v, *sight, backend)[0]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, *sight, backend)[0]
    return kernel("attention_fwd", backend)(q, k, v, *sight)[0]
