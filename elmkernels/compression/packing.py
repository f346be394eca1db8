"""Packing the weights of a model: bfloat16 without loss in 12 bits, see `compress.packed`."""

import torch
from torch import nn

from ..openelm.compressed import Compressed, Packed12Module, packed12_module
from ..openelm.model import OpenELM
from ..weights.formats import ESCAPE
from ..weights.packed12 import count_exponents, pack_weight
from .conversion import Conversion, convert, dense_weight, plain

# An escape takes 6 bytes and, in a product, a step of its own where the others go 32 or more at a
# time: from 1 in 64 on, those steps would be as long as all the rest.
MAX_ESCAPES = 1 / 64


def pack(model: OpenELM, embeddings: bool = True, *, progress: bool = True) -> Conversion:
    """Pack every bfloat16 projection of an OpenELM model in place, without loss; with embeddings,
    those of tokens and the output as well. A matrix with more than 1 escape in 64 weights stays
    as it is and is reported. An accelerated model stays accelerated. progress: show it on a
    terminal.

    Raises TypeError for another model, ValueError for weights of another dtype and for quantized
    ones; nothing is changed then. Stopped half way, it can be called again.
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
    """Give a packed model its plain bfloat16 modules back (for training, or to be cast), in place.

    Raises TypeError for another model, ValueError for one that holds no packed weights.
    """
    if isinstance(model, OpenELM) and not any(
        isinstance(m, Packed12Module) for m in model.modules()
    ):
        raise ValueError("model must hold packed weights to be unpacked, it has none")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Packed12Module):
            return None
        return plain(module, dense_weight(module), model.config.padding_index)

    return convert(model, True, "unpacked", lambda name, module: None, make, progress)
