"""Products of few rows, as decoding has, by this package's kernel in vLLM's linear layers; of more
rows by vLLM's own, for which it keeps its copy of the weight.

What is compiled for any number of tokens must not decide by that number, so the op decides that the
compiled code calls: `elmkernels_vllm::few_rows`, which knows its layer by name.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from ...backends import kernel
from ...checks import last_dim_contiguous
from ...weights.formats import form_of
from . import switch
from .pages import LargePages

log = init_logger("vllm.elmkernels")


@CustomOp.register("elmkernels_linear")
class Linear(CustomOp):
    """The name by which `--compilation-config` switches this."""


class _FewRows:
    """What a layer's method does more than vLLM's: `most` rows are the kernel's."""

    _count = itertools.count()
    apply: Any

    def __init__(self, most: int, pages: LargePages) -> None:
        super().__init__()
        self.most, self.pages = most, pages
        self.name = f"layer {next(self._count)}"  # of this process: every one builds the same
        self.layer: nn.Module | None = None
        _METHODS[self.name] = self

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight in large pages, before vLLM makes its copy and drops it."""
        weight = self.pages.copy(layer.weight.detach())
        layer.weight.data = weight
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        self.layer, self.n = layer, weight.shape[0]
        self.parts = form_of(weight).parts()
        self.kernel = kernel("linear_fwd", switch.backend_of(Linear.name, "cpu") or "")

    def product(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        if 0 < rows <= self.most:
            return self.kernel(last_dim_contiguous(x), *self.parts)
        return super().apply(self.layer, x)  # type: ignore[misc]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            return super().apply(layer, x, bias)  # type: ignore[misc]
        return torch.ops.elmkernels_vllm.few_rows(x, self.n, self.name)


class LayerMethod(_FewRows, UnquantizedLinearMethod):
    """Of a projection."""


class HeadMethod(_FewRows, UnquantizedEmbeddingMethod):
    """Of the output projection."""


_METHODS: WeakValueDictionary[str, _FewRows] = WeakValueDictionary()
_LIBRARY = torch.library.Library("elmkernels_vllm", "DEF")
_LIBRARY.define("few_rows(Tensor x, int n, str layer) -> Tensor")


def _product(x: Tensor, n: int, layer: str) -> Tensor:
    return _METHODS[layer].product(x)


def _product_fake(x: Tensor, n: int, layer: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


_LIBRARY.impl("few_rows", _product, "CPU")
torch.library.register_fake("elmkernels_vllm::few_rows", _product_fake, lib=_LIBRARY)


def few_rows(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the plain projections of a model and its head multiply few rows by this package's
    kernel, and log it, if that is on and was measured to be faster on such a processor.

    Args:
        model: built, without weights.
        dtype: of its activations.
    """
    if not Linear.enabled():
        return
    device = current_platform.device_type
    most = switch.most_rows(dtype, device)
    log.info_once(switch.products_line(most, dtype, device))
    if not most:
        return
    Linear()  # vLLM warns of an op that is on and that no model builds
    pages = LargePages()
    kinds = {UnquantizedLinearMethod: LayerMethod, UnquantizedEmbeddingMethod: HeadMethod}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        kind = kinds.get(type(method))
        if kind is not None and not name.endswith("token_embeddings"):
            module.quant_method = kind(most, pages)
