"""Packing the weights of a model: bfloat16 without loss in 12 bits, see `weights.packed12`."""

from typing import cast

import torch
from torch import nn

from ..acceleration.layout import native
from ..openelm.compressed import Compressed, Packed12Module, packed12_module
from ..openelm.model import OpenELM
from ..weights.formats import ESCAPE
from ..weights.packed12 import count_exponents, pack_weight
from .conversion import Conversion, convert, dense_weight, plain

# An escape takes 6 bytes and, in a product, a step of its own where the others go 32 or more at a
# time: from 1 in 64 on, those steps would be as long as all the rest.
MAX_ESCAPES = 1 / 64


def pack(model: OpenELM, embeddings: bool = True, *, progress: bool = True) -> Conversion:
    """Pack the bfloat16 matrices of a model into 12 bits a weight, in place and without loss.

    A matrix with more than 1 escape in 64 weights stays as it is and is reported. An accelerated
    model stays accelerated. Interrupted, it can be called again and goes on. Hooks go
    over to the modules that replace others.

    Args:
        model: an `elmkernels.OpenELM` with bfloat16 weights.
        embeddings: whether those of tokens, and the output projection, are packed too.
        progress: whether to show it on a terminal.

    Returns:
        A Conversion: how many matrices, which were left and why, bytes before and after.

    Raises:
        TypeError: the model is another one.
        ValueError: weights have another dtype or are quantized; nothing is changed then.

    Example:
        >>> done = elmkernels.pack(model)
        >>> done.bytes_after < done.bytes_before
        True
    """

    def check(name: str, module: nn.Module) -> None:
        if isinstance(module, Compressed):
            if not isinstance(module, Packed12Module):
                raise ValueError(f"{name} must be plain bfloat16, got {type(module).__name__}")
        elif module.weight.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bfloat16 to be packed, got {module.weight.dtype}")

    def make(name: str, module: nn.Module) -> nn.Module | str | None:
        if isinstance(module, Packed12Module):
            return None
        w = dense_weight(module)
        table = count_exponents(w)
        if table.escapes > MAX_ESCAPES * w.numel():
            return (
                f"{table.escapes / w.numel():.1%} of its weights have an exponent beside the "
                f"{ESCAPE} commonest (at most {MAX_ESCAPES:.1%} pay)"
            )
        return packed12_module(name, pack_weight(w, table))

    return convert(model, embeddings, "packed", check, make, progress)


def unpack(model: OpenELM, *, progress: bool = True) -> Conversion:
    """Give a model its plain bfloat16 matrices back, in place: to be trained, or cast. Hooks go
    over to the modules that replace others.

    Args:
        model: an `elmkernels.OpenELM` that `pack` has packed.
        progress: whether to show it on a terminal.

    Returns:
        A Conversion: how many matrices, bytes before and after.

    Raises:
        TypeError: the model is another one.
        ValueError: it holds no packed12 weights.

    Example:
        >>> print(elmkernels.unpack(model))
    """
    body = native(model)
    if isinstance(body, OpenELM) and not any(isinstance(m, Packed12Module) for m in body.modules()):
        raise ValueError("model must hold packed12 weights to be unpacked, it has none")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Packed12Module):
            return None
        return plain(module, dense_weight(module), cast(OpenELM, body).config.padding_index)

    return convert(model, True, "unpacked", lambda name, module: None, make, progress)
