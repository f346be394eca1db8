"""Packing the weights of a model: bfloat16 without loss in 12 bits, see `compress.packed`."""

import torch
from torch import Tensor, nn

from ..openelm.compressed import Compressed, CompressedEmbedding, CompressedLinear
from ..openelm.model import OpenELM
from ..weights.formats import ESCAPE, Packed
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

    Raises TypeError for another model, ValueError for weights of another dtype and for quantised
    ones; nothing is changed then. Stopped half way, it can be called again.
    """

    def check(name: str, module: nn.Module) -> None:
        if isinstance(module, Compressed):
            if not isinstance(module, _Packed):
                raise ValueError(f"{name} must be plain bfloat16, got {type(module).__name__}")
        elif module.weight.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bfloat16 to be packed, got {module.weight.dtype}")

    def make(name: str, module: nn.Module) -> nn.Module | str | None:
        if isinstance(module, _Packed):
            return None
        w = dense_weight(module)
        table = count_exponents(w)
        if table.escapes > MAX_ESCAPES * w.numel():
            return (
                f"{table.escapes / w.numel():.1%} of its weights have an exponent beside the "
                f"{ESCAPE} commonest (at most {MAX_ESCAPES:.1%} pay)"
            )
        return packed_module(name, pack_weight(w, table))

    return convert(model, embeddings, "packed", check, make, progress)


def unpack(model: OpenELM, *, progress: bool = True) -> Conversion:
    """Give a packed model its plain bfloat16 modules back (for training, or to be cast), in place.

    Raises TypeError for another model, ValueError for one that holds no packed weights.
    """
    if isinstance(model, OpenELM) and not any(isinstance(m, _Packed) for m in model.modules()):
        raise ValueError("model must hold packed weights to be unpacked, it has none")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, _Packed):
            return None
        return plain(module, dense_weight(module), model.config.padding_index)

    return convert(model, True, "unpacked", lambda name, module: None, make, progress)


class _Packed(Compressed):
    """Buffers named as in a checkpoint. They stay what they are when the model is cast."""

    names = ("packed", "exponents", "escape_starts", "escape_columns", "escape_values")

    def __init__(self, weight: Packed) -> None:
        super().__init__(weight)
        tensors = (
            weight.data,
            weight.exponents,
            weight.escape_starts,
            weight.escape_columns,
            weight.escape_values,
        )
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def compressed(self) -> Packed:
        return Packed(*(getattr(self, name) for name in self.names), self.in_features)

    def _apply(self, fn, recurse=True):
        before = self.escape_values
        super()._apply(fn, recurse)
        if self.escape_values.dtype != torch.bfloat16:
            self.escape_values = before.to(self.escape_values.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # How many escapes there are is the weight's own: make room for those that come.
        for name in ("escape_columns", "escape_values"):
            incoming, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(incoming, Tensor) and incoming.dim() == 1:
                setattr(self, name, own.new_empty(incoming.shape[0]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PackedLinear(_Packed, CompressedLinear):
    """A projection by a packed weight."""


class PackedEmbedding(_Packed, CompressedEmbedding):
    """Token embeddings by a packed weight, and the tied head's weight."""


def packed_module(name: str, weight: Packed) -> PackedLinear | PackedEmbedding:
    """The module of a model's matrix, by its name in the model."""
    return (PackedEmbedding if name == "token_embeddings" else PackedLinear)(weight)
