"""Modules whose weight is compressed: what quantized and packed projections and embeddings share.

    Linear     y = x w^T      dx = dy w
    Embedding  y = w[ids], and as the tied head y = x w^T

A compressed weight is data, not a Parameter: gradients pass through it to x, none are kept for it.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..ops.linear import blocks, dense_rows, linear
from ..reference import dense
from ..weights.formats import Affine, Packed12, Weight


def weight_of(module: nn.Module) -> Weight:
    """The weight [n, k] of a projection or an embedding, in the form in which it is held."""
    return module.compressed() if isinstance(module, Compressed) else module.weight


def gather_rows(weight: Weight, ids: Tensor) -> Weight:
    """The rows that ids [m] name, as a weight of the same form."""
    if isinstance(weight, Affine):
        q = weight.q.view(torch.int32)[ids].view(torch.uint32)  # torch can't index uint32
        return Affine(q, weight.scales[ids], weight.biases[ids], weight.bits, weight.group_size)
    if isinstance(weight, Packed12):
        begin = weight.escape_starts[ids]
        counts = weight.escape_starts[ids + 1] - begin
        starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        found = torch.repeat_interleave(begin - starts[:-1], counts)
        found += torch.arange(found.shape[0], dtype=found.dtype, device=found.device)
        return Packed12(
            weight.data[ids],
            weight.exponents,
            starts,
            weight.escape_columns[found],
            weight.escape_values[found],
            weight.columns,
        )
    return weight[ids]


class _Product(torch.autograd.Function):
    """Dtypes that `ops.linear` doesn't take: float64, and packed weights with any but theirs."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for begin, end in blocks(weight, x.dtype):
            y[..., begin:end] = F.linear(x, dense_rows(weight, x.dtype, begin, end))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy @ dense_rows(ctx.weight, dy.dtype, 0, ctx.weight.shape[0]), None


def product(x: Tensor, weight: Weight, backend: str | None = None) -> Tensor:
    """x [..., k], weight [n, k] in any form -> x weight^T [..., n] in x's dtype (autocast's where
    that is on), differentiable in x, and in the weight where it is a Tensor. backend: of a
    compressed weight, as in `ops.linear`.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if x.dtype == torch.float64 or (isinstance(weight, Packed12) and x.dtype != weight.dtype):
        return _Product.apply(x, weight)
    return linear(x, weight, backend=backend)


class Compressed(nn.Module):
    """A module that holds one compressed weight in buffers, `names` in the order of its form."""

    names: tuple[str, ...]

    def __init__(self, weight: Affine | Packed12) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # What the output of an embedding is cast to: follows model.to(dtype) like a Parameter.
        self.dtype = weight.dtype
        self.backend: str | None = None  # of `ops.linear`; `accelerate` names one

    def compressed(self) -> Affine | Packed12:
        """The weight, whose tensors are this module's buffers."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        device = getattr(self, self.names[0]).device
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        super()._apply(fn, recurse)
        self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class CompressedLinear(Compressed):
    """x [..., in_features] -> [..., out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.compressed(), self.backend)


class CompressedEmbedding(Compressed):
    """ids [...] -> [..., in_features] in `dtype`; only the rows that ids name are made dense."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = dense(gather_rows(self.compressed(), ids.flatten().long()), self.dtype)
        return rows.view(*ids.shape, self.in_features)


class Quantized(Compressed):
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


class QuantizedLinear(Quantized, CompressedLinear):
    """A projection by a quantized weight."""


class QuantizedEmbedding(Quantized, CompressedEmbedding):
    """Token embeddings by a quantized weight, and the tied head's weight."""


def quantized_module(name: str, weight: Affine) -> QuantizedLinear | QuantizedEmbedding:
    """The module of a model's matrix, by its name in the model."""
    return (QuantizedEmbedding if name == "token_embeddings" else QuantizedLinear)(weight)


class Packed12Module(Compressed):
    """Buffers named as in a checkpoint. They stay what they are when the model is cast."""

    names = ("packed", "exponents", "escape_starts", "escape_columns", "escape_values")

    def __init__(self, weight: Packed12) -> None:
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

    def compressed(self) -> Packed12:
        return Packed12(*(getattr(self, name) for name in self.names), self.in_features)

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


class Packed12Linear(Packed12Module, CompressedLinear):
    """A projection by a packed weight."""


class Packed12Embedding(Packed12Module, CompressedEmbedding):
    """Token embeddings by a packed weight, and the tied head's weight."""


def packed12_module(name: str, weight: Packed12) -> Packed12Linear | Packed12Embedding:
    """The module of a model's matrix, by its name in the model."""
    return (Packed12Embedding if name == "token_embeddings" else Packed12Linear)(weight)
