"""swiglu: y = round(silu(gate)) * up for gate_up = [gate | up] along the last dimension.

Backward, with s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * silu(gate),
written as one [dgate | dup]. Only gate_up is saved; silu is recomputed.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, choose, define, kernel
from ..checks import fail, floating, last_dim_contiguous
from ..derivatives import Derivative, once, unusual
from ._flops import counted

define(
    "swiglu",
    backends=(*CPU, "triton"),
    fwd=(
        "(Tensor gate_up) -> Tensor",
        lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    ),
    bwd=(
        "(Tensor dy, Tensor gate_up) -> Tensor",
        lambda dy, gate_up: gate_up.new_empty(gate_up.shape),
    ),
)
counted("swiglu")


class _SwiGLU(Derivative):
    op = "swiglu"

    @staticmethod
    def forward(gate_up, backend):
        return kernel("swiglu_fwd", backend)(gate_up)

    @staticmethod
    def keep(ctx, inputs, output):
        gate_up, ctx.backend = inputs
        ctx.save_for_backward(gate_up)

    @staticmethod
    def backward(ctx, dy):
        bwd = kernel("swiglu_bwd", ctx.backend)
        return once("swiglu", bwd, last_dim_contiguous(dy), *ctx.saved_tensors), None


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated activation of OpenELM's feed-forward network, of proj_1's output.

    Args:
        gate_up: [..., 2n] float32, bfloat16 or float16, any strides: the gate, then what it gates.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        [..., n], contiguous, in gate_up's dtype: silu(gate) * up. Differentiable.

    Raises:
        TypeError, ValueError: gate_up isn't a floating tensor, or its last dimension is odd.
        RuntimeError: the named backend can't run here.

    Example:
        >>> elmkernels.swiglu(torch.randn(3, 128)).shape
        torch.Size([3, 64])
    """
    floating("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        fail("gate_up", "[..., 2n]", list(gate_up.shape))
    backend = choose("swiglu", gate_up.device.type, backend)
    if backend == REFERENCE:
        return reference.swiglu(gate_up)
    gate_up = last_dim_contiguous(gate_up)
    if unusual():
        return _SwiGLU.transformed(gate_up, backend)
    if gate_up.requires_grad and torch.is_grad_enabled():
        return _SwiGLU.apply(gate_up, backend)
    return kernel("swiglu_fwd", backend)(gate_up)
