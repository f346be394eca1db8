"""Modules whose weight is compressed: what quantized and packed projections and embeddings share.

    Linear     y = x w^T      dx = dy w
    Embedding  y = w[ids], and as the tied head y = x w^T

A compressed weight is data, not a Parameter: gradients pass through it to x, none are kept for it.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import fail
from ..derivatives import Derivative, once, unusual
from ..ops.linear import blocks, dense_rows, linear
from ..reference import dense
from ..surgery import known
from ..weights.affine import check_scheme, quantize_weight
from ..weights.as_tensor import AsTensor
from ..weights.checks import check_stored
from ..weights.formats import SEGMENT_BYTES, SEGMENT_COLUMNS, Affine, Form, Packed12, Weight
from ..weights.packed12 import pack_weight


def weight_of(module: nn.Module) -> Weight:
    """The weight [n, k] of a projection or an embedding, in the form in which it is held."""
    return module.compressed() if isinstance(module, Compressed) else cast(Tensor, module.weight)


class _Product(Derivative):
    """Dtypes that `ops.linear` doesn't take: float64, and packed12 weights with any but theirs."""

    op, remedy = "a product with a compressed weight", "call `unpack`, or make the weight dense"

    @staticmethod
    def forward(x, weight):
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for begin, end in blocks(weight, x.dtype):
            y[..., begin:end] = F.linear(x, dense_rows(weight, x.dtype, begin, end))
        return y

    @staticmethod
    def keep(ctx, inputs, output):
        _, ctx.weight = inputs

    @staticmethod
    def backward(ctx, dy):
        return once(_Product.op, _gradient, dy, ctx.weight, remedy=_Product.remedy), None


def _gradient(dy: Tensor, weight: Weight) -> Tensor:
    return dy @ dense_rows(weight, dy.dtype, 0, weight.shape[0])


def product(x: Tensor, weight: Weight, **how: Any) -> Tensor:
    """x [..., k], weight [n, k] in any form -> x weight^T [..., n] in x's dtype (autocast's where
    that is on), differentiable in x, and in the weight where it is a Tensor. how: backend and
    activations of a compressed weight, as in `ops.linear`.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if x.dtype == torch.float64 or not weight.takes(x.dtype):
        return (_Product.transformed if unusual() else _Product.apply)(x, weight)
    return linear(x, weight, **how)


def dtype_of(embedding: nn.Module, other: torch.dtype) -> torch.dtype:
    """The dtype of what an embedding gives, in which the layers compute whatever their norms are
    in; `other` if it doesn't say.
    """
    held = embedding if isinstance(embedding, Compressed) else getattr(embedding, "weight", None)
    dtype = getattr(held, "dtype", other)
    return dtype if dtype.is_floating_point else other


PACKED12_SCHEME = {"format": "packed12", "version": 1}
# {name: (shape, dtype)} of stored tensors; None: any size, any floating dtype.
Stored = dict[str, tuple[tuple[int | None, ...], str | None]]


class Compressed(nn.Module):
    """A module that holds one compressed weight in buffers, `names` in the order of its form."""

    names: tuple[str, ...]
    activations: str | None = None  # of `ops.linear`; `accelerate` names them

    def __init__(self, weight: Form) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype  # of an embedding's output: follows model.to(dtype)
        # Not registered one by one: `weight` is a property of a projection.
        self._buffers.update(self._named(weight))
        self.backend: str | None = None  # of `ops.linear`; `accelerate` names one

    def compressed(self) -> Affine | Packed12:
        """The weight, whose tensors are this module's buffers."""
        return self.form([cast(Tensor, self._buffers[name]) for name in self.names])

    def form(self, tensors: list[Tensor]) -> Affine | Packed12:
        """The weight of other tensors, in the order of `names`."""
        raise NotImplementedError

    def _named(self, weight: Form) -> dict[str, Tensor]:
        tensors = [part for part in weight.parts() if isinstance(part, Tensor)]
        return dict(zip(self.names, tensors, strict=True))

    def encoded(self, weight: Tensor) -> Form:
        """A dense matrix in this module's form."""
        raise NotImplementedError

    # What a checkpoint says of the form: the word in config.json that describes it, its name in
    # messages, the tensor that no other form has, the one dtype that it may be loaded in.
    word: str
    label: str
    mark: str
    only_dtype: torch.dtype | None = None

    @staticmethod
    def read_scheme(value: Any) -> dict[str, Any]:
        """What config.json says under `word`, checked. Raises ValueError."""
        raise NotImplementedError

    def scheme(self) -> dict[str, Any]:
        """The same of this module, to be written."""
        raise NotImplementedError

    @staticmethod
    def stored(shape: tuple[int, int], scheme: dict[str, Any]) -> Stored:
        """The tensors of a stored matrix [n, k] by their names."""
        raise NotImplementedError

    @staticmethod
    def loaded(
        name: str, tensors: list[Tensor], columns: int, scheme: dict[str, Any]
    ) -> "Compressed":
        """The module of a matrix by its name in the model, of the tensors that `stored` names, in
        that order. Raises ValueError for tensors that contradict each other.
        """
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """All that comes is checked together, with what stays, before any of it is taken."""
        given = {n: state_dict[prefix + n] for n in self.names if prefix + n in state_dict}
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            if given:
                self._check_given(prefix.rstrip("."), given, assign)
                self._make_room(given)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_given(self, name: str, given: Mapping[str, Any], assign: bool) -> None:
        """Raise ValueError or TypeError unless what is given and what stays make a weight."""
        tensors = []
        for part in self.names:
            own = cast(Tensor, self._buffers[part])
            x = given.get(part, own)
            if not isinstance(x, Tensor):
                fail(f"{name}.{part}", "a tensor", type(x).__name__, TypeError)
            if not own.is_floating_point() or not x.is_floating_point():
                if x.dtype != own.dtype:
                    fail(f"{name}.{part}", own.dtype, x.dtype, TypeError)
            tensors.append(x if assign else x.detach().to(own.device, own.dtype).contiguous())
        weight = self.form(tensors)
        check_stored(name, weight)
        if weight.shape != (self.out_features, self.in_features):
            fail(name, [self.out_features, self.in_features], list(weight.shape))

    def _make_room(self, given: Mapping[str, Tensor]) -> None:
        """Make buffers as large as the tensors that are about to be copied into them."""

    def _apply(self, fn, recurse=True):
        device = cast(Tensor, self._buffers[self.names[0]]).device
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        super()._apply(fn, recurse)
        self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class CompressedLinear(Compressed, nn.Linear):
    """x [..., in_features] -> [..., out_features].

    An nn.Linear to who asks: an adapter wraps it, and can read and write its `weight`.
    """

    def __init__(self, weight: Form) -> None:
        super().__init__(weight)
        self.register_parameter("bias", None)

    @property
    def weight(self) -> AsTensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return AsTensor(self.compressed(), self.dtype, self.put)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Hold another dense matrix [out_features, in_features], in the same form."""
        if weight.shape != (self.out_features, self.in_features):
            fail("weight", [self.out_features, self.in_features], list(weight.shape))
        self._buffers.update(self._named(self.encoded(weight)))

    def __setattr__(self, name: str, value: Any) -> None:
        # Who unwraps a module gives the weight to it again: if it is its own, bit for bit.
        if name != "weight" or not isinstance(value, Tensor) or not value.is_floating_point():
            super().__setattr__(name, value)
        elif isinstance(value, AsTensor) and value.put == self.put:
            self._buffers.update(self._named(value.form))
        else:
            self.put(value)

    def reset_parameters(self) -> None:
        """Nothing: it holds data."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.compressed(), backend=self.backend, activations=self.activations)


class CompressedEmbedding(Compressed):
    """ids [...] -> [..., in_features] in `dtype`; only the rows that ids name are made dense."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = dense(self.compressed().gather(ids.flatten().long()), self.dtype)
        return rows.view(*ids.shape, self.in_features)


class Quantized(Compressed):
    """Buffers as MLX names them: weight uint32, scales, biases (see `formats.Affine`)."""

    scales: Tensor
    biases: Tensor
    names = ("weight", "scales", "biases")
    word, label, mark = "quantization", "quantized", "scales"

    def __init__(self, weight: Affine) -> None:
        super().__init__(weight)
        self.bits, self.group_size = weight.bits, weight.group_size

    def encoded(self, weight: Tensor) -> Affine:
        return quantize_weight(weight.to(self.scales.dtype), self.bits, self.group_size)

    def form(self, tensors: list[Tensor]) -> Affine:
        q, scales, biases = tensors
        return Affine(q, scales, biases, self.bits, self.group_size)

    @staticmethod
    def read_scheme(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not {"bits", "group_size"} <= value.keys():
            raise ValueError(f"quantization must have bits and group_size, got {value!r}")
        mode = value.get("mode", "affine")
        others = sorted(value.keys() - {"bits", "group_size", "mode"})
        if mode != "affine" or others:
            raise ValueError(
                "quantization must be of mode 'affine' and the same for every matrix, "
                f"got {mode!r}{', and ' * bool(others)}{', '.join(others)}"
            )
        check_scheme(value["bits"], value["group_size"])
        return {"group_size": value["group_size"], "bits": value["bits"]}

    def scheme(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits}

    @staticmethod
    def stored(shape: tuple[int, int], scheme: dict[str, Any]) -> Stored:
        n, k = shape
        groups = (n, k // scheme["group_size"])
        words = (n, k * scheme["bits"] // 32)
        return {"weight": (words, "U32"), "scales": (groups, None), "biases": (groups, None)}

    @staticmethod
    def loaded(
        name: str, tensors: list[Tensor], columns: int, scheme: dict[str, Any]
    ) -> Compressed:
        q, scales, biases = tensors
        weight = Affine(q, scales, biases, scheme["bits"], scheme["group_size"])
        check_stored(name, weight)
        return quantized_module(name, weight)

    def __getstate__(self) -> dict:
        # Python's pickle of a uint32 tensor can't be read back: travel as int32.
        state = self.__dict__.copy()
        words = cast(Tensor, self._buffers["weight"]).view(torch.int32)
        state["_buffers"] = self._buffers | {"weight": words}
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        words = cast(Tensor, self._buffers["weight"])
        self._buffers["weight"] = words.view(torch.uint32)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


@known
class QuantizedLinear(Quantized, CompressedLinear):
    """A projection by a quantized weight."""


@known
class QuantizedEmbedding(Quantized, CompressedEmbedding):
    """Token embeddings by a quantized weight, and the tied head's weight."""


def quantized_module(name: str, weight: Affine) -> QuantizedLinear | QuantizedEmbedding:
    """The module of a model's matrix, by its name in the model."""
    return (QuantizedEmbedding if name == "token_embeddings" else QuantizedLinear)(weight)


class Packed12Module(Compressed):
    """Buffers named as in a checkpoint. They stay what they are when the model is cast."""

    packed: Tensor
    exponents: Tensor
    escape_starts: Tensor
    escape_columns: Tensor
    escape_values: Tensor
    names = ("packed", "exponents", "escape_starts", "escape_columns", "escape_values")
    word, label, mark, only_dtype = "elmkernels", "packed12", "packed", torch.bfloat16

    def encoded(self, weight: Tensor) -> Packed12:
        return pack_weight(weight.to(torch.bfloat16))

    def form(self, tensors: list[Tensor]) -> Packed12:
        packed, exponents, starts, at, values = tensors
        return Packed12(packed, exponents, starts, at, values, self.in_features)

    @staticmethod
    def read_scheme(value: Any) -> dict[str, Any]:
        if value != PACKED12_SCHEME:
            raise ValueError(f"elmkernels must be {PACKED12_SCHEME}, got {value!r}")
        return PACKED12_SCHEME

    def scheme(self) -> dict[str, Any]:
        return PACKED12_SCHEME

    @staticmethod
    def stored(shape: tuple[int, int], scheme: dict[str, Any]) -> Stored:
        n, k = shape
        segments = -(-k // SEGMENT_COLUMNS)
        return {
            "packed": ((n, segments, SEGMENT_BYTES), "U8"),
            "exponents": ((16,), "U8"),
            "escape_starts": ((n + 1,), "I32"),
            "escape_columns": ((None,), "I32"),
            "escape_values": ((None,), "BF16"),
        }

    @staticmethod
    def loaded(
        name: str, tensors: list[Tensor], columns: int, scheme: dict[str, Any]
    ) -> Compressed:
        packed, exponents, starts, at, values = tensors
        weight = Packed12(packed, exponents, starts, at, values, columns)
        check_stored(name, weight)
        return packed12_module(name, weight)

    def _apply(self, fn, recurse=True):
        before = self.escape_values
        super()._apply(fn, recurse)
        if self.escape_values.dtype != torch.bfloat16:
            self.escape_values = before.to(self.escape_values.device)
        return self

    def _make_room(self, given: Mapping[str, Tensor]) -> None:
        # How many escapes there are is the weight's own.
        for name in {"escape_columns", "escape_values"} & given.keys():
            setattr(self, name, getattr(self, name).new_empty(given[name].shape))


@known
class Packed12Linear(Packed12Module, CompressedLinear):
    """A projection by a packed12 weight."""


@known
class Packed12Embedding(Packed12Module, CompressedEmbedding):
    """Token embeddings by a packed12 weight, and the tied head's weight."""


def packed12_module(name: str, weight: Packed12) -> Packed12Linear | Packed12Embedding:
    """The module of a model's matrix, by its name in the model."""
    return (Packed12Embedding if name == "token_embeddings" else Packed12Linear)(weight)


# The forms that a checkpoint can hold, by their words in config.json.
STORED_FORMS: dict[str, type[Compressed]] = {m.word: m for m in (Quantized, Packed12Module)}
