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
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..derivatives import unusual


class _Again(NamedTuple):
    make: Callable[[], Tensor]
    shape: torch.Size


def _unpack(kept: Tensor | _Again) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.make().view(kept.shape)


def apply(
    module: Callable[[Tensor], Tensor], x: Tensor, make: Callable[[], Tensor] | None
) -> Tensor:
    """module(x), keeping `make`, which gives x again, where the backward pass would keep x.

    make must hold detached tensors only. None, or no gradients to keep: module(x).
    """
    if make is None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or unusual():
        return module(x)
    address, count = x.data_ptr(), x.numel()

    def pack(kept: Tensor) -> Tensor | _Again:
        same = kept.data_ptr() == address and kept.numel() == count and kept.dtype == x_dtype
        return _Again(make, kept.shape) if same and kept.is_contiguous() else kept

    x_dtype = x.dtype
    with saved_tensors_hooks(pack, _unpack):
        return module(x)
