"""linear: y = x w^T for a weight that is plain, affine-quantized or packed12 (see `formats`).

Before it maybe a norm, x' = rms_norm(x, norm); after it maybe swiglu(y) or residual + y, each
rounded as it is on its own.

Few rows of x (up to MAX_ROWS) are bound by memory: a streaming kernel reads each byte of the weight
once, as it is stored, and where the backend has `linear_fused` it does what comes before and after.
More rows are bound by arithmetic: the product is torch's own, and of a compressed weight a block of
at most BLOCK_BYTES is dense at once (`linear_many`: a panel). It takes no gradient; x does: dy w.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import AMX, CPU, REFERENCE, Traits, choose, define, kernel, optional_kernel
from ..checks import fail, floating, last_dim_contiguous, like, number, shape, truth
from ..checks import weight as check_norm
from ..derivatives import refuse, unusual
from ..weights.checks import check_activations, check_weight
from ..weights.formats import Weight, form_of
from ._flops import counted, of_linear
from ._linear_dense import BLOCK_BYTES, blocks, dense_rows, streamed_parts, torch_product
from .rms_norm import rms_norm
from .swiglu import swiglu as gated

__all__ = ["BLOCK_BYTES", "MAX_ROWS", "blocks", "dense_rows", "linear"]

MAX_ROWS = 8

_PARTS = (
    "Tensor data, Tensor? scales, Tensor? biases, Tensor? exponents, Tensor? escape_starts, "
    "Tensor? escape_columns, Tensor? escape_values"
)
_PRODUCT = (
    f"(Tensor x, {_PARTS}, int bits) -> Tensor",
    lambda x, data, *_: x.new_empty((*x.shape[:-1], data.shape[0])),
)


def _fused_fake(x: Tensor, data: Tensor, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0] // (2 if rest[-2] else 1)))  # swiglu halves


define(
    "linear",
    backends=(*CPU, AMX, "triton"),
    traits=Traits(falls_back=True),
    fwd=(*_PRODUCT, (*CPU, "triton")),
    int8=(*_PRODUCT, CPU),
    many=(*_PRODUCT, (AMX,)),
    fused=(
        f"(Tensor x, {_PARTS}, int bits, Tensor? norm, float eps, bool swiglu, Tensor? residual) "
        "-> Tensor",
        _fused_fake,
        ("triton",),
    ),
    dense=(
        f"(Tensor like, {_PARTS}, int bits, int k, int begin, int end) -> Tensor",
        lambda like, *rest: like.new_empty((rest[-1] - rest[-2], rest[-3])),
        (*CPU, "triton"),
    ),
)
counted("linear", fwd=of_linear, int8=of_linear, many=of_linear, fused=of_linear)


def linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
    residual: Tensor | None = None,
    activations: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The product x weight^T with a weight in any form, and what stands before and after it.

    Args:
        x: [..., k] float32, bfloat16 or float16, any strides.
        weight: a tensor [n, k] of x's dtype, an `Affine` (scales in any of the dtypes) or a
            `Packed12` (x must then be bfloat16). A compressed one takes no gradient.
        norm: [k] in x's dtype or float32: the weight of an RMS norm that x goes through first.
        eps: of that norm.
        swiglu: whether the product goes through `swiglu`: weight is [gate | up], n is even.
        residual: [..., n] in x's dtype, what the product is added to; None with swiglu.
        activations: "int8" rounds the rows that an `Affine` weight is multiplied by to 8 bits, as
            `reference.int8_rows`: less exact, without gradients. None: as they are.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        [..., n] (with swiglu n / 2), contiguous, in x's dtype; sums are float32.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device.
        RuntimeError: the named backend can't run here.
        NotImplementedError: a gradient is asked for through activations="int8".

    Example:
        >>> x, weight = torch.randn(3, 64), torch.randn(128, 64)
        >>> elmkernels.linear(x, weight, norm=torch.ones(64), swiglu=True).shape
        torch.Size([3, 64])
    """
    _check(x, weight, norm, swiglu, residual)
    number("eps", eps)
    special = unusual()
    others = [t for t in (x, norm, residual, weight) if isinstance(t, Tensor)]
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in others)
    if activations is not None:
        check_activations("activations", activations, weight)
        if wants or special:
            refuse("linear", "derivative of activations='int8'", "call it without activations")
    if (chosen := choose("linear", x.device.type, backend)) == REFERENCE:
        return reference.linear(x, weight, norm, eps, swiglu, residual, activations)
    rows = x.numel() // max(1, x.shape[-1])
    streamed = not (wants or special) and 0 < rows <= MAX_ROWS and x.numel() and weight.shape[0]
    around = activations is None and (swiglu or norm is not None or residual is not None)
    if streamed and around and (fused := optional_kernel("linear_fused", chosen)):
        residual = None if residual is None else last_dim_contiguous(residual)
        return fused(last_dim_contiguous(x), *streamed_parts(weight), norm, eps, swiglu, residual)
    if norm is not None:
        x = rms_norm(x, norm, eps, backend=backend)
    int8 = activations and streamed and optional_kernel("linear_int8", chosen)
    if activations and not int8:
        x = reference.int8_rows(x)
    if streamed:
        product = int8 or kernel("linear_fwd", chosen)
        y = product(last_dim_contiguous(x), *streamed_parts(weight))
    else:
        y = torch_product(x, weight, wants, special, chosen)
    if swiglu:
        y = gated(y, backend=backend)
    return y if residual is None else residual + y


def _check(
    x: Tensor, weight: Weight, norm: Tensor | None, swiglu: bool, residual: Tensor | None
) -> None:
    floating("x", x)
    check_weight("weight", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        fail("x", f"[..., {k}] like weight's columns", list(x.shape))
    if not form_of(weight).takes(x.dtype):
        fail("weight", f"{x.dtype} like x", weight.dtype, TypeError)
    if weight.device != x.device:
        fail("weight", f"on {x.device} like x", weight.device)
    truth("swiglu", swiglu)
    if norm is not None:
        check_norm("norm", norm, k, "x", x)
    if swiglu and n % 2:
        fail("weight", "[2n, k] with swiglu", [n, k])
    if residual is not None:
        like("residual", residual, "x", x)
        shape("residual", residual, (*x.shape[:-1], n))
        if swiglu:
            fail("residual", "None with swiglu", f"a tensor {list(residual.shape)}")
