"""Quantising the weights of a model, to 8 or 4 bits: see `compress.affine`."""

import torch
from torch import nn

from ..openelm.compressed import Compressed, CompressedEmbedding, CompressedLinear
from ..openelm.model import OpenELM
from ..weights.affine import DTYPES, check_scheme, quantize_weight
from ..weights.formats import Affine
from .conversion import Conversion, convert, dense_weight


def quantize(
    model: OpenELM,
    bits: int = 4,
    group_size: int = 64,
    embeddings: bool = True,
    *,
    progress: bool = True,
) -> Conversion:
    """Quantise every projection of an OpenELM model in place; with embeddings, those of tokens and
    the output as well. A packed model is quantised from its exact weights; an accelerated one
    stays accelerated. progress: show it on a terminal.

    Raises TypeError for another model, ValueError as `quantize_weight` does, and for a model that
    is quantised in another way; nothing is changed then. Stopped half way, it can be called again.
    """
    check_scheme(bits, group_size)

    def check(name: str, module: nn.Module) -> None:
        if isinstance(module, _Quantized):
            if (module.bits, module.group_size) != (bits, group_size):
                raise ValueError(
                    f"{name} is quantised already, to {module.bits} bits in groups of "
                    f"{module.group_size}; asked for {bits} bits in groups of {group_size}"
                )
            return
        k = module.in_features if hasattr(module, "in_features") else module.embedding_dim
        if k % group_size:
            raise ValueError(f"{name} has {k} columns, no multiple of group_size {group_size}")
        dtype = module.dtype if isinstance(module, Compressed) else module.weight.dtype
        if dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
        w = dense_weight(module)
        if w.numel() and not all(bool(extreme.isfinite()) for extreme in w.aminmax()):
            raise ValueError(f"{name} must be finite to be quantised, got inf or nan")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, _Quantized):
            return None
        affine = quantize_weight(dense_weight(module), bits, group_size)
        return quantized_module(name, affine)

    return convert(model, embeddings, f"quantised to {bits} bits", check, make, progress)


class _Quantized(Compressed):
    """Buffers as MLX names them: weight uint32, scales, biases (see `formats.Affine`)."""

    names = ("weight", "scales", "biases")

    def __init__(self, weight: Affine) -> None:
        super().__init__(weight)
        self.bits, self.group_size = weight.bits, weight.group_size
        for name, tensor in zip(self.names, (weight.q, weight.scales, weight.biases), strict=True):
            self.register_buffer(name, tensor)

    def compressed(self) -> Affine:
        return Affine(self.weight, self.scales, self.biases, self.bits, self.group_size)

    def __getstate__(self) -> dict:
        # Python's pickle of a uint32 tensor can't be read back: travel as int32.
        state = self.__dict__.copy()
        state["_buffers"] = self._buffers | {"weight": self.weight.view(torch.int32)}
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.weight = self.weight.view(torch.uint32)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


class QuantizedLinear(_Quantized, CompressedLinear):
    """A projection by a quantised weight."""


class QuantizedEmbedding(_Quantized, CompressedEmbedding):
    """Token embeddings by a quantised weight, and the tied head's weight."""


def quantized_module(name: str, weight: Affine) -> QuantizedLinear | QuantizedEmbedding:
    """The module of a model's matrix, by its name in the model."""
    return (QuantizedEmbedding if name == "token_embeddings" else QuantizedLinear)(weight)
