"""The fused classes of a model's modules: fused ops around the module's own projections.

There are three conventions of calling: this package's model (`Context`), CoreNet's (past_keys and
past_values in and out) and Apple's Hugging Face code (a Cache object); the last two are in
`foreign`. A child is passed over if it is `plain`, else called as a module; what the kernels don't
take (float64, a DTensor) goes through the forward of the module's own class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, reference
from ..backends import REFERENCE
from ..checks import DTYPES
from ..derivatives import unusual
from ..devices import autocast_dtype
from ..openelm.documents import in_one_row
from ..openelm.layers import Context, LogitsHead, RMSNorm
from ..openelm.loss import LossHead, plain_weight
from ..openelm.shared_weight import TiedWeightGradient
from ..surgery import as_made, known, plain, plain_tensor, untouched
from . import recompute, small_batch
from .classes import Fused, setting, while_fused
from .projections import forget

# qkv and the weights of its norms; None for them if the norms were called.
Normed = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass
class State:
    """What a fused module is given: the backend of its op."""

    backend: str | None


@dataclass
class FeedForwardState(State):
    """gated: whether the activation is SwiGLU, else a plain SiLU; activation: the class of the
    module for it that the forward passes over, None if there is none.
    """

    gated: bool
    activation: type[nn.Module] | None = None


@dataclass
class LayerState(State):
    """backend: of `ops.add_rms_norm`; linear_backend: of `ops.linear`, for few rows."""

    linear_backend: str | None


@dataclass
class AttentionState(State):
    """backend: of `ops.qk_norm_rope`; index: of the layer."""

    attention_backend: str | None
    index: int
    q_heads: int
    kv_heads: int


def takes(x: Tensor) -> bool:
    """Whether the kernels take such a tensor at all."""
    return x.dtype in DTYPES and plain_tensor(x)


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels normalize x with a weight: in x's dtype or in float32."""
    return takes(x) and plain_tensor(weight) and weight.dtype in (x.dtype, torch.float32)


def takes_norms(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> bool:
    """Whether the kernels normalize the heads of qkv with these weights, which None has none of."""
    if q_weight is None or k_weight is None:
        return True
    return q_weight.dtype == k_weight.dtype and all(
        takes_norm(qkv, weight) for weight in (q_weight, k_weight)
    )


def plain_norm(norm: Any, x: Tensor) -> bool:
    """Whether a shortcut may go past a norm of x."""
    known_norm = isinstance(norm, RMSNorm | FusedRMSNorm)
    return known_norm and plain(norm) and takes_norm(x, norm.weight)


def _projected(x: Tensor) -> torch.dtype:
    """The dtype in which a projection takes x: autocast's if it is on."""
    return autocast_dtype(x.device.type) or x.dtype


def _narrowed(x: Tensor) -> Tensor:
    return x.to(_projected(x))


class FusedRMSNorm(Fused):
    """Any RMSNorm with `weight` and `eps`."""

    _fused: State
    weight: nn.Parameter
    eps: float
    backend = setting("backend")

    @while_fused
    def forward(self, x: Tensor) -> Tensor:
        if not takes_norm(x, self.weight):
            return super().forward(x)
        return ops.rms_norm(x, self.weight, self.eps, backend=self._fused.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, backend={self.backend}"


class FusedFeedForward(Fused):
    """proj_2(swiglu(proj_1(x))), or with a plain SiLU if there is no gate."""

    _fused: FeedForwardState
    proj_1: nn.Module
    proj_2: nn.Module
    gated, backend = setting("gated"), setting("backend")

    @while_fused
    def forward(self, x: Tensor, make: Callable[[], Tensor] | None = None) -> Tensor:
        """make gives x again in the backward pass (see `recompute`); the gated activation is then
        made again too.
        """
        state, activation = self._fused, self._modules.get("act")
        if activation is not None and not (
            type(activation) is state.activation
            and untouched(activation)
            and as_made(type(activation))
        ):
            return super().forward(x)
        x = recompute.apply(self.proj_1, x, make)
        if not state.gated:
            return self.proj_2(F.silu(x))
        if not takes(x):
            return self.proj_2(reference.swiglu(x))
        kept = x.detach()

        def activated() -> Tensor:
            return ops.swiglu(kept, backend=state.backend)

        again = None if make is None else activated
        return recompute.apply(self.proj_2, ops.swiglu(x, backend=state.backend), again)


@known
class FusedLogitsHead(Fused, LogitsHead):
    """Norm and projection of few rows in one product, if there is a kernel (see `small_batch`).
    backend: of `ops.linear`.
    """

    _fused: State
    backend = setting("backend")

    @while_fused
    def forward(self, model: Any, x: Tensor) -> Tensor:
        logits = small_batch.logits(model, x, self._fused.backend)
        return super().forward(model, x) if logits is None else logits


@known
class FusedLossHead(Fused, LossHead):
    """The projection and its loss in one op, if the projection is a plain matrix."""

    _fused: State
    backend = setting("backend")

    def shared_gradient(self, embedding: nn.Module) -> TiedWeightGradient | None:
        weight = plain_weight(embedding)
        if (
            weight is None
            or not isinstance(embedding, nn.Embedding)
            or not (weight.requires_grad and torch.is_grad_enabled())
            or torch.compiler.is_compiling()  # its graph has no room for a gradient that waits
            or unusual()  # nor has a transform
            or embedding.sparse
            or self._fused.backend == REFERENCE  # which has every derivative
            or embedding.scale_grad_by_freq
            or embedding.max_norm is not None
        ):
            return None
        forget(weight)
        return TiedWeightGradient(weight, embedding.padding_idx)

    @while_fused
    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        project: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> Tensor:
        if weight is None or not takes_norm(hidden, weight):
            return super().forward(hidden, targets, weight, project, **options)
        if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
            forget(weight)
        backend = self._fused.backend
        return ops.linear_cross_entropy(hidden, weight, targets, backend=backend, **options)


class AttentionParts(Fused):
    """What the fused attentions of all conventions share."""

    _fused: Any  # AttentionState
    qkv_proj: nn.Module
    out_proj: nn.Module
    q_norm: Any
    k_norm: Any
    head_dim: int
    backend, attention_backend = setting("backend"), setting("attention_backend")

    def extra_repr(self) -> str:
        state = self._fused
        return f"q_heads={state.q_heads}, kv_heads={state.kv_heads}, backend={state.backend}"


def rotated(
    attn: Any, normed: Normed, positions: Tensor, table: Tensor, eps: float, **cache: Any
) -> Any:
    """qkv [batch, length, ...] and the weights of its norms -> q, k, v (see `ops.qk_norm_rope`)."""
    state: AttentionState = attn._fused
    return ops.qk_norm_rope(
        *normed,
        positions,
        state.q_heads,
        state.kv_heads,
        table,
        eps=eps,
        backend=state.backend,
        **cache,
    )


class FusedAttention(AttentionParts):
    """Attention of this package's model."""

    eps: float
    layer_index: int  # its place in a cache, wherever the layer is moved to
    normalized: Callable[[Tensor], Normed]

    @while_fused
    def attended(self, qkv: Tensor, context: Context) -> Tensor:
        """qkv_proj's output -> what out_proj takes, [batch, length, q_heads head_dim]."""
        normed = self.normalized(qkv) if takes(qkv) else None
        if normed is None or not takes_norms(*normed):
            return super().attended(qkv, context)  # pyright: ignore[reportAttributeAccessIssue]
        cache, length, state = context.cache, qkv.shape[1], self._fused
        given = normed, context.positions, context.rope_table, self.eps
        if cache is None:
            q, k, v = rotated(self, *given)
        else:
            i = self.layer_index
            buffers = {"k_cache": cache.k[i], "v_cache": cache.v[i], "slots": context.slots}
            q, _, _ = rotated(self, *given, **buffers)
            k, v = cache.filled(i, length)
        if context.attend is not None:
            return context.attend(self, q, k, v).reshape(*qkv.shape[:2], -1)
        if context.cu_seqlens is not None:
            q, k, v = in_one_row((q, k, v))
        out = ops.attention(
            q,
            k,
            v,
            key_mask=context.key_mask,
            offsets=context.offsets,
            cu_seqlens=context.cu_seqlens,
            backend=state.attention_backend,
        )
        return out.reshape(*qkv.shape[:2], state.q_heads * self.head_dim)

    @while_fused
    def forward(
        self, x: Tensor, context: Context, make: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """make gives x again in the backward pass (see `recompute`)."""
        make = make if context.cache is None else None
        out = self.attended(recompute.apply(self.qkv_proj, x, make), context)
        return self.out_proj(out if context.kept is None else context.kept(out))


class LayerParts(Fused):
    """h = x + attn(attn_norm(x)); h + ffn(ffn_norm(h)), the first addition fused with its norm."""

    _fused: LayerState
    attn: nn.Module
    ffn: nn.Module
    attn_norm: nn.Module
    ffn_norm: Any
    backend, linear_backend = setting("backend"), setting("linear_backend")


def add_feed_forward(
    layer: Any, delta: Tensor, x: Tensor, again: Callable[..., Callable[[], Tensor]] | None = None
) -> Tensor:
    """x + delta, and what a layer's feed-forward network adds to it. again: what gives (x, norm) ->
    a function that makes norm(x) once more, if that may be done in the backward pass.
    """
    norm, ffn = layer.ffn_norm, layer.ffn
    # Under autocast a projection's output is narrower than the residual stream.
    if (
        not plain_norm(norm, x)
        or delta.shape != x.shape
        or not takes(delta)
        or torch.promote_types(delta.dtype, x.dtype) != x.dtype
    ):
        x = x + delta
        return x + ffn(norm(x))
    backend = layer._fused.backend
    normed, x = ops.add_rms_norm(delta.to(x.dtype), x, norm.weight, norm.eps, backend=backend)
    if again is not None and isinstance(ffn, FusedFeedForward) and plain(ffn):
        return x + ffn(_narrowed(normed), again(x, norm))
    return x + ffn(normed)


class FusedDecoderLayer(LayerParts):
    """A layer of this package's model."""

    def _again(self, x: Tensor, norm: Any) -> Callable[[], Tensor]:
        """What gives norm(x), as the projection after it takes it, once more."""
        kept, weight, dtype = x.detach(), norm.weight.detach(), _projected(x)
        backend, eps = self._fused.backend, norm.eps
        return lambda: ops.rms_norm(kept, weight, eps, backend=backend).to(dtype)

    def _may_keep(self) -> bool:
        """Whether the part after attention may run on the positions that are asked for alone: what
        hangs on one of its modules sees them all.
        """
        attn, ffn = self._modules["attn"], self._modules["ffn"]
        if not (isinstance(attn, FusedAttention) and isinstance(ffn, FusedFeedForward)):
            return False
        parts = attn, attn.out_proj, self.ffn_norm, ffn, ffn.proj_1, ffn.proj_2
        return all(plain(part) for part in parts)

    @while_fused
    def forward(self, x: Tensor, context: Context) -> Tensor:
        if small_batch.applies(x, self._fused.linear_backend):
            weights = small_batch.weights_of(self, x)
            if weights is not None:
                return small_batch.forward(self, x, context, weights)
        if context.kept is not None and not self._may_keep():
            context = context._replace(kept=None)
        norm, attn, lean = self.attn_norm, self.attn, recompute.applies()
        if lean and isinstance(attn, FusedAttention) and plain(attn) and plain_norm(norm, x):
            delta = attn(_narrowed(norm(x)), context, self._again(x, norm))
        else:
            delta = attn(norm(x), context)
        x = x if context.kept is None else context.kept(x)
        return add_feed_forward(self, delta, x, self._again if lean else None)
