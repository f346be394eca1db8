"""Quantizing the weights of a model, to 8 or 4 bits: see `compress.affine`."""

from torch import nn

from ..openelm.compressed import Compressed, Quantized, quantized_module
from ..openelm.model import OpenELM
from ..weights.affine import DTYPES, check_scheme, quantize_weight
from .conversion import Conversion, convert, dense_weight


def quantize(
    model: OpenELM,
    bits: int = 4,
    group_size: int = 64,
    embeddings: bool = True,
    *,
    progress: bool = True,
) -> Conversion:
    """Quantize every projection of an OpenELM model in place; with embeddings, those of tokens and
    the output as well. A packed model is quantized from its exact weights; an accelerated one
    stays accelerated. progress: show it on a terminal.

    Raises TypeError for another model, ValueError as `quantize_weight` does, and for a model that
    is quantized in another way; nothing is changed then. Stopped half way, it can be called again.
    """
    check_scheme(bits, group_size)

    def check(name: str, module: nn.Module) -> None:
        if isinstance(module, Quantized):
            if (module.bits, module.group_size) != (bits, group_size):
                raise ValueError(
                    f"{name} is quantized already, to {module.bits} bits in groups of "
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
            raise ValueError(f"{name} must be finite to be quantized, got inf or nan")

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Quantized):
            return None
        affine = quantize_weight(dense_weight(module), bits, group_size)
        return quantized_module(name, affine)

    return convert(model, embeddings, f"quantized to {bits} bits", check, make, progress)
