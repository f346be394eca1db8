"""This package's ops as vLLM's custom ops, which `--compilation-config` switches by name, and
vLLM's own in their place.

An op that is on and has kernels for the device is ours, compiled or not; else the layer that
vLLM's other models have is taken as it is.
"""

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm as NativeRMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

from ... import ops, reference
from . import switch

log = init_logger("vllm.elmkernels")


@CustomOp.register("elmkernels_rms_norm")
class RMSNorm(CustomOp):
    """rms_norm, and add_rms_norm if a residual is given, as vLLM's layer of that name."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.backend = eps, _backend(type(self))

    def forward_cpu(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, backend=self.backend)
        return ops.add_rms_norm(x, residual, self.weight, self.eps, backend=self.backend)

    forward_cuda = forward_hip = forward_cpu

    def forward_native(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return reference.rms_norm(x, self.weight, self.eps)
        return reference.add_rms_norm(x, residual, self.weight, self.eps)


@CustomOp.register("elmkernels_swiglu")
class SwiGLU(CustomOp):
    """swiglu, as vLLM's SiluAndMul."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = _backend(type(self))

    def forward_cpu(self, x: Tensor) -> Tensor:
        return ops.swiglu(x, backend=self.backend)

    forward_cuda = forward_hip = forward_cpu

    def forward_native(self, x: Tensor) -> Tensor:
        return reference.swiglu(x)


@CustomOp.register("elmkernels_qk_norm_rope")
class QKNormRope(CustomOp):
    """qk_norm_rope of what qkv_proj gives, [tokens, columns] -> q, k, v [tokens, columns]."""

    def __init__(self, heads: tuple[int, int], eps: float, table: Tensor) -> None:
        super().__init__()
        self.q_heads, self.kv_heads = heads
        self.eps, self.backend = eps, _backend(type(self))
        self.register_buffer("rope_table", table, persistent=False)

    def forward_cpu(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = ops.qk_norm_rope(
            qkv, q_weight, k_weight, positions, self.q_heads, self.kv_heads, self.rope_table,
            eps=self.eps, backend=self.backend,
        )  # fmt: skip
        return _flat(found)

    forward_cuda = forward_hip = forward_cpu

    def forward_native(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = reference.qk_norm_rope(
            qkv, q_weight, k_weight, positions, self.q_heads, self.kv_heads, self.rope_table,
            self.eps,
        )  # fmt: skip
        return _flat(found)


class NativeQKNormRope(nn.Module):
    """The same by vLLM's RMSNorm and rotary embedding."""

    def __init__(
        self, heads: tuple[int, int], head_dim: int, eps: float, positions: int, base: float
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = heads, head_dim, eps
        rope = {"rope_type": "default", "rope_theta": base}
        self.rotary = get_rope(head_dim, max_position=positions, rope_parameters=rope)

    def forward(
        self, qkv: Tensor, q_norm: nn.Module | None, k_norm: nn.Module | None, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_heads, kv_heads = self.heads
        widths = [count * self.head_dim for count in (q_heads, kv_heads, kv_heads)]
        q, k, v = qkv.split(widths, dim=-1)
        if q_norm is not None and k_norm is not None:
            q = q_norm(q.unflatten(-1, (q_heads, -1))).flatten(-2)
            k = k_norm(k.unflatten(-1, (kv_heads, -1))).flatten(-2)
        q, k = self.rotary(positions, q, k)
        return q, k, v


def _flat(heads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads
    return q.flatten(-2), k.flatten(-2), v.flatten(-2)


def _backend(kind: type[CustomOp]) -> str | None:
    return switch.backend_of(kind.name, current_platform.device_type)


def runs(kind: type[CustomOp]) -> bool:
    """Whether an op is ours: it is on, and has kernels for the device."""
    return kind.enabled() and _backend(kind) is not None


def norm(size: int, eps: float) -> nn.Module:
    """A layer that norms rows, and adds a residual before if it gets one."""
    return RMSNorm(size, eps) if runs(RMSNorm) else NativeRMSNorm(size, eps)


def gated() -> nn.Module:
    """silu(gate) * up of [gate | up]."""
    return SwiGLU() if runs(SwiGLU) else SiluAndMul()


def report() -> None:
    """Log once which ops run."""
    device = current_platform.device_type
    kinds = (RMSNorm, QKNormRope, SwiGLU)
    chosen = {kind.name: _backend(kind) if kind.enabled() else None for kind in kinds}
    log.info_once(switch.line(chosen, device))
