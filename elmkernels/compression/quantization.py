"""Quantizing the weights of a model, to 8 or 4 bits: see `weights.affine`."""

from typing import Any

import torch
from torch import nn

from ..acceleration.decoder_weights import decoder_weights_of
from ..acceleration.layout import PROJECTIONS
from ..acceleration.swap import accelerate
from ..checks import fail
from ..openelm.compressed import Compressed, Quantized, quantized_module, weight_of
from ..openelm.layers import RMSNorm
from ..openelm.model import OpenELM
from ..ops.linear import dense_rows
from ..surgery import mark_of, set_module
from ..weights.affine import DTYPES, check_scheme, quantize_weight
from ..weights.formats import GROUP_SIZES
from .conversion import Conversion, convert, dense_weight, matrices


def quantize(
    model: OpenELM,
    bits: int = 4,
    group_size: int = 64,
    embeddings: bool = True,
    *,
    progress: bool = True,
) -> Conversion:
    """Quantize the matrices of a model to 8 or 4 bits, in place.

    A packed12 matrix is quantized from its exact weights. An accelerated model stays accelerated.
    Interrupted, it can be called again and goes on. Hooks go
    over to the modules that replace others.

    Args:
        model: an `elmkernels.OpenELM`.
        bits: of a weight: 8 or 4.
        group_size: columns that share a scale and a bias: 32 or 64.
        embeddings: whether those of tokens, and the output projection, are quantized too.
        progress: whether to show it on a terminal.

    Returns:
        A Conversion: how many matrices, bytes before and after.

    Raises:
        TypeError: the model is another one.
        ValueError: bits or group_size is out of its range, the columns are no multiple of the
            group, weights are of another dtype or not finite, or quantized with another scheme;
            nothing is changed then.

    Example:
        >>> done = elmkernels.quantize(model, bits=4, group_size=64)
        >>> done.bytes_after < done.bytes_before
        True
    """
    check_scheme(bits, group_size)
    bits, group_size = int(bits), int(group_size)

    def check(name: str, module: nn.Module) -> None:
        if isinstance(module, Quantized):
            if (module.bits, module.group_size) != (bits, group_size):
                raise ValueError(
                    f"{name} is quantized already, to {module.bits} bits in groups of "
                    f"{module.group_size}; asked for {bits} bits in groups of {group_size}"
                )
            return
        k = weight_of(module).shape[1]
        if k % group_size:
            fits = next((f"; group_size {g} fits" for g in GROUP_SIZES if k % g == 0), "")
            problem = f"{name} has {k} columns, no multiple of group_size {group_size}"
            raise ValueError(problem + fits)
        dtype = module.dtype if isinstance(module, Compressed) else module.weight.dtype
        if dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
        w = dense_weight(module)
        if w.numel() and not all(bool(extreme.isfinite()) for extreme in w.aminmax()):
            raise ValueError(f"{name} must be finite to be quantized, got inf or nan")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Quantized):
            return None
        affine = quantize_weight(dense_weight(module), bits, group_size)
        return quantized_module(name, affine)

    return convert(model, embeddings, f"quantized to {bits} bits", check, make, progress)


@torch.inference_mode(False)  # it lives on outside of that mode
@torch.no_grad()
def quantized_copy(model: OpenELM, bits: int = 4, group_size: int | None = None) -> OpenELM:
    """A copy of a model with quantized matrices, accelerated as the model is, which stays as it is.

    No dense copy is made on the way: memory grows by what the copy takes.

    Args:
        model: an `elmkernels.OpenELM`; its norms and rotary table are shared.
        bits: of a weight: 8 or 4.
        group_size: columns that share a scale and a bias; None for the largest that fits all.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: bits or group_size is out of its range or doesn't fit, or the model computes
            more than its weights say (adapters, hooks).

    Example:
        >>> draft = quantized_copy(model, bits=4)
    """
    weights = decoder_weights_of(model)
    found = {"token_embeddings": weights.embedding}
    if model.classifier is not None:
        found["classifier"] = weights.head
    for i, layer in enumerate(weights.layers):
        for path in PROJECTIONS:
            found[f"layers.{i}.{path}"] = getattr(layer, path.rpartition(".")[2])
    columns = {weight.shape[1] for weight in found.values()}
    if group_size is None:
        fits = (g for g in sorted(GROUP_SIZES, reverse=True) if not any(k % g for k in columns))
        group_size = next(fits, min(GROUP_SIZES))
    check_scheme(bits, group_size)
    if wrong := sorted(k for k in columns if k % group_size):
        fail("model", f"of columns that are a multiple of {group_size} to be quantized", wrong[0])
    copy = OpenELM(model.config, device="meta")
    for name in matrices(copy, embeddings=True):
        weight = found[name]
        dense = dense_rows(weight, weight.dtype, 0, weight.shape[0]).detach()
        set_module(copy, name, quantized_module(name, quantize_weight(dense, bits, group_size)))
    own: dict[str, Any] = dict(model.named_modules())
    for name, module in copy.named_modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(own[name].weight.detach(), requires_grad=False)
            module.eps = own[name].eps
    copy.rope_table = model.rope_table
    mark = mark_of(model)
    if mark is not None:
        accelerate(copy, **mark.arguments)
    return copy.eval()
