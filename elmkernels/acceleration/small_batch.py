"""A layer and the head on a few rows: four products, with the norms, SwiGLU and additions in them.

    qkv = linear(x, qkv_proj, norm=attn_norm);  out = attention(qk_norm_rope(qkv))
    x = linear(out, out_proj, residual=x);      h = linear(x, proj_1, norm=ffn_norm, swiglu=True)
    x = linear(h, proj_2, residual=x);          logits = linear(x, head, norm=norm)

Each rounds where the layer's own modules do. It is for backends whose `linear` has such a kernel
(Triton's), up to MAX_ROWS tokens at once and without gradients; for this package's own model alone,
and if nothing hangs on the modules that are then not called. Else the layers call their modules.

Compressed weights always go this way; plain ones do if the plan is `streamed`, else cuBLAS
multiplies by them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..backends import choose, optional_kernel
from ..devices import autocast_dtype
from ..openelm import layers
from ..openelm.compressed import CompressedLinear, weight_of
from ..openelm.layers import Context
from ..ops.linear import MAX_ROWS
from ..surgery import plain
from ..weights.formats import Weight, form_of
from .classes import Fused
from .projections import Linear, TiedHead


class Weights(NamedTuple):
    """The projections of a layer."""

    qkv_proj: Weight
    out_proj: Weight
    proj_1: Weight
    proj_2: Weight


def applies(x: Tensor, backend: str | None) -> bool:
    """Whether the kernel is there for x [batch, length, model_dim]; backend: of `ops.linear`."""
    rows, kind = x.shape[0] * x.shape[1], x.device.type
    if not 0 < rows <= MAX_ROWS or torch.is_grad_enabled() or autocast_dtype(kind) is not None:
        return False
    return streams(kind, backend)


def streams(device: str, backend: str | None) -> bool:
    """Whether the backend that `linear` takes on a device type has the kernel."""
    return optional_kernel("linear_fused", choose("linear", device, backend)) is not None


def _fits(x: Tensor, weight: Weight) -> bool:
    return form_of(weight).takes(x.dtype)


def _weight(x: Tensor, module: nn.Module) -> Weight | None:
    """The weight of a projection that is a product with it and nothing more."""
    if not plain(module):
        return None
    if isinstance(module, Linear):
        if module.bias is not None or not module.plan.streamed:
            return None
    elif not isinstance(module, CompressedLinear):
        return None
    weight = weight_of(module)
    return weight if _fits(x, weight) else None


def weights_of(layer: Any, x: Tensor) -> Weights | None:
    """The projections of a fused layer; None if it can't go this way."""
    attn, ffn, norms = layer.attn, layer.ffn, (layer.attn_norm, layer.ffn_norm)
    if not all(isinstance(n, layers.RMSNorm) and plain(n) for n in norms):
        return None
    if not all(isinstance(m, Fused) and plain(m) for m in (attn, ffn)):
        return None
    if any(n.weight.dtype != x.dtype for n in norms):
        return None
    found = (_weight(x, m) for m in (attn.qkv_proj, attn.out_proj, ffn.proj_1, ffn.proj_2))
    weights = tuple(w for w in found if w is not None)
    return Weights(*weights) if len(weights) == 4 else None


def forward(layer: Any, x: Tensor, context: Context, weights: Weights) -> Tensor:
    """What `FusedDecoderLayer.forward` gives."""
    attn, ffn = layer.attn, layer.ffn
    backend = layer.linear_backend
    first, second = layer.attn_norm, layer.ffn_norm
    qkv = ops.linear(x, weights.qkv_proj, norm=first.weight, eps=first.eps, backend=backend)
    out = attn.attended(qkv, context)
    x = ops.linear(out, weights.out_proj, residual=x, backend=backend)
    h = ops.linear(
        x, weights.proj_1, norm=second.weight, eps=second.eps, swiglu=ffn.gated, backend=backend
    )
    if not ffn.gated:
        h = F.silu(h)
    return ops.linear(h, weights.proj_2, residual=x, backend=backend)


def logits(model: Any, x: Tensor, backend: str | None) -> Tensor | None:
    """The head of the norm of x in one product; None if the fused head does not apply."""
    norm, head = model.norm, model.tied_head
    if not isinstance(norm, layers.RMSNorm) or not plain(norm) or not isinstance(norm, Fused):
        return None
    if norm.weight.dtype != x.dtype or not applies(x, backend) or not model._straight():
        return None
    if model.classifier is not None:
        weight = _weight(x, model.classifier)
    elif isinstance(head, TiedHead) and plain(model.token_embeddings):
        weight = weight_of(model.token_embeddings)
        if isinstance(weight, Tensor) and not head.products.plan.streamed or not _fits(x, weight):
            weight = None
    else:
        weight = None
    if weight is None:
        return None
    return ops.linear(x, weight, norm=norm.weight, eps=norm.eps, backend=backend)
