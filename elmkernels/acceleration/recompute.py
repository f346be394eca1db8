"""What is cheaper to make again in the backward pass than to keep: outputs of norms and of SwiGLU.

A projection keeps its input for the gradient of its weight. Where that input is the output of a
norm or of SwiGLU, whose own inputs are kept anyhow, it is made again instead: one pass over memory
beside a matrix product. Bit for bit the same input, by the same kernel.

Kept for each token of a layer, in elements (d: model_dim, q and kv: the widths of all query and of
all key/value heads, f: the feed-forward width; lse: one float32 a query head):

    op              keeps for its backward          projection after it keeps
    rms_norm        x: d                            made again (else d)
    qk_norm_rope    qkv: q + 2 kv                   -
    attention       q, k, v, out: 2 q + 2 kv; lse   out, the same memory
    add_rms_norm    the sum: d                      made again (else d)
    swiglu          gate_up: 2 f                    made again (else f)

v is a view of qkv, and x and the sum are the residual stream itself. The last projection and the
loss keep their input alone (see `ops.linear_cross_entropy`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..derivatives import unusual
from ..surgery import plain


class _Again(NamedTuple):
    make: Callable[[], Tensor]
    shape: torch.Size


def _unpack(kept: Tensor | _Again) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.make().view(kept.shape)


# What torch asks itself before it packs a tensor; of a torch without them, nothing is made again.
_autograd = getattr(torch._C, "_autograd", None)
_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_allowed = getattr(_autograd, "_saved_tensors_hooks_is_enabled", None)


def applies() -> bool:
    """Whether inputs may be made again here: gradients are kept, hooks are allowed (`torch.func`
    forbids them), and nobody else decides what is kept: activation checkpointing and offloading do,
    and ours inside would hold what they mean to let go. A compiler makes that choice itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or unusual():
        return False
    if _hooks is None or _allowed is None:
        return False
    return _allowed() and _hooks(True) is None


def _equal(kept: Tensor, again: _Again) -> bool:
    with torch.no_grad():
        return torch.equal(kept, again.make().view(again.shape))


def apply(module: nn.Module, x: Tensor, make: Callable[[], Tensor] | None) -> Tensor:
    """module(x), keeping `make`, which gives x again, where the backward pass would keep x.

    make must hold detached tensors only, and is None unless `applies()`: then module(x). If the
    module isn't plain (an adapter, a hook), what it keeps is compared with what is made first.
    """
    if make is None:
        return module(x)
    address, count, x_dtype, sure = x.data_ptr(), x.numel(), x.dtype, plain(module)

    def pack(kept: Tensor) -> Tensor | _Again:
        same = kept.data_ptr() == address and kept.numel() == count and kept.dtype == x_dtype
        if not same or not kept.is_contiguous():
            return kept
        again = _Again(make, kept.shape)
        return again if sure or _equal(kept, again) else kept

    with saved_tensors_hooks(pack, _unpack):
        return module(x)
