"""Every model shape, once: from a few numbers to the head counts and widths of each layer.

OpenELM scales its layers: with multipliers (a, b) layer i of n gets
m_i = round(linspace(a, b, n)[i], 2), and from it

    q_heads = make_divisible(m_i model_dim, head_dim num_gqa_groups) / head_dim
    kv_heads = q_heads / num_gqa_groups
    ffn_dim = make_divisible(m_i model_dim, ffn_dim_divisor)

Field names are CoreNet's, which the Hugging Face checkpoints use as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ..weights.texts import read_yaml

_VARIANT_SHAPES = {  # layers, model_dim, head_dim
    "OpenELM-270M": (16, 1280, 64),
    "OpenELM-450M": (20, 1536, 64),
    "OpenELM-1_1B": (28, 2048, 64),
    "OpenELM-3B": (36, 3072, 128),
}
VARIANTS = tuple(_VARIANT_SHAPES)
# Of sizes: what kernels count rows and columns in. A layer costs Python objects before its weights.
_LARGEST, _MOST_LAYERS = 2**31 - 1, 10_000
_LEAST, _MOST = 1e-30, 1e30  # of multipliers, eps and the rotary base: well inside of float32
_HF_REQUIRED = ("num_transformer_layers", "model_dim", "head_dim", "vocab_size")


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, never under 0.9 of it and never 0."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def expand_multipliers(
    name: str, multipliers: float | Sequence[float], layers: int
) -> tuple[float, ...]:
    """One multiplier a layer, from a number, a (first, last) pair or the expanded list.

    With two layers a pair and a list are the same thing, up to the pair's rounding to two
    decimals, so two numbers are always read as a pair.
    """
    if _is_number(multipliers):
        expanded = (float(multipliers),) * layers
    elif isinstance(multipliers, str | bool) or not isinstance(multipliers, Sequence):
        raise TypeError(f"{name} must be a number or a list of numbers, got {multipliers!r}")
    elif not all(map(_is_number, multipliers)):
        raise TypeError(f"{name} must hold finite numbers, got {multipliers!r}")
    elif len(multipliers) == 2:
        # numpy's rounding scales by 100 and back; Python's own differs in the last digit of ties.
        expanded = tuple(np.round(np.linspace(*multipliers, layers, dtype=float), 2).tolist())
    elif len(multipliers) == layers:
        expanded = tuple(float(m) for m in multipliers)
    else:
        raise ValueError(
            f"{name} must be a number, a pair or a list of {layers} (num_transformer_layers), "
            f"got a list of {len(multipliers)}"
        )
    if not all(m > 0 for m in expanded):
        raise ValueError(f"{name} must be positive, got {multipliers!r}")
    return expanded


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, so a finite one; a boolean is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and -_MOST <= value <= _MOST


@dataclass(frozen=True)
class OpenELMConfig:
    """The shape of one model, checked when it is made.

    Every field may be given; of num_query_heads, num_kv_heads, ffn_multipliers and ffn_dims there
    is one entry a layer afterwards. Head counts that are given win over qkv_multipliers.

    Attributes:
        num_transformer_layers: how many layers.
        model_dim: the width of what goes from layer to layer.
        head_dim: the width of a head, even.
        num_gqa_groups: query heads for each key/value head.
        qkv_multipliers, ffn_multipliers: a number, a pair (first, last) or one number a layer, from
            which a layer's heads, and its feed-forward's width, follow.
        ffn_with_glu: whether the feed-forward is gated.
        ffn_dim_divisor: what feed-forward widths are multiples of.
        activation_fn_name, normalization_layer_name: "swish" and "rms_norm"; there are no others.
        normalize_qk_projections: whether queries and keys go through an RMS norm.
        share_input_output_layers: whether the output projection is the embedding's weight.
        rope_freq_constant: the base of the rotary frequencies.
        rope_max_length: how many positions there are, in tokens.
        vocab_size: how many token ids.
        max_context_length: the tokens that a model is trained with.
        norm_eps: what RMS norms add to the mean of the squares.
        padding_index: the id whose embedding gets no gradient; None for none.
        num_query_heads, num_kv_heads: of each layer; None if they follow from the multipliers.
        model_name: what it is called; None for a model without a name.

    Raises:
        TypeError, ValueError: a field has a wrong type or value.

    Example:
        >>> config = OpenELMConfig.from_name("OpenELM-270M")
        >>> config.num_query_heads[0], config.num_query_heads[-1]
        (12, 20)
    """

    num_transformer_layers: int = 12
    model_dim: int = 2048
    head_dim: int = 128
    num_gqa_groups: int = 1  # query heads for each key/value head
    qkv_multipliers: float | Sequence[float] = 1.0
    ffn_multipliers: float | Sequence[float] = 4.0
    ffn_with_glu: bool = True
    ffn_dim_divisor: int = 256
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = False
    share_input_output_layers: bool = False
    rope_freq_constant: float = 10000
    rope_max_length: int = 4096
    vocab_size: int = 32000
    max_context_length: int = 2048
    norm_eps: float = 1e-6
    padding_index: int | None = None
    num_query_heads: Sequence[int] | None = None
    num_kv_heads: Sequence[int] | None = None
    model_name: str | None = None
    ffn_dims: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in (
            "num_transformer_layers",
            "model_dim",
            "head_dim",
            "num_gqa_groups",
            "ffn_dim_divisor",
            "rope_max_length",
            "vocab_size",
            "max_context_length",
        ):
            _check_positive_integer(name, getattr(self, name))
        layers = self.num_transformer_layers
        if layers > _MOST_LAYERS:
            raise ValueError(f"num_transformer_layers must be at most {_MOST_LAYERS}, got {layers}")
        for name in ("norm_eps", "rope_freq_constant"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= _LEAST:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("ffn_with_glu", "normalize_qk_projections", "share_input_output_layers"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates halves), got {self.head_dim}")
        if self.activation_fn_name != "swish":
            raise ValueError(f"activation_fn_name must be 'swish', got {self.activation_fn_name!r}")
        if self.normalization_layer_name != "rms_norm":
            raise ValueError(
                "normalization_layer_name must be 'rms_norm', "
                f"got {self.normalization_layer_name!r}"
            )
        padding = self.padding_index
        if padding is not None and not (
            isinstance(padding, Integral)
            and not isinstance(padding, bool)
            and 0 <= padding < self.vocab_size
        ):
            raise ValueError(f"padding_index must lie in [0, {self.vocab_size}), got {padding!r}")
        ffn = self._widths("ffn_multipliers", self.ffn_multipliers)
        q_heads, kv_heads = self._heads()
        derived = {
            "ffn_multipliers": ffn,
            "ffn_dims": tuple(
                make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in ffn
            ),
            "num_query_heads": q_heads,
            "num_kv_heads": kv_heads,
        }
        if not isinstance(self.qkv_multipliers, Real):
            derived["qkv_multipliers"] = tuple(self.qkv_multipliers)
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _widths(self, name: str, multipliers: float | Sequence[float]) -> tuple[float, ...]:
        """One multiplier a layer, each of which gives a width that can be."""
        expanded = expand_multipliers(name, multipliers, self.num_transformer_layers)
        if max(expanded) * self.model_dim > _LARGEST:
            raise ValueError(
                f"{name} must be at most {_LARGEST / self.model_dim:g} for model_dim "
                f"{self.model_dim}, got {max(expanded):g}"
            )
        return expanded

    def _heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layers = self.num_transformer_layers
        multipliers = self._widths("qkv_multipliers", self.qkv_multipliers)
        if self.num_query_heads is None:
            divisor = self.head_dim * self.num_gqa_groups
            q_heads = tuple(
                make_divisible(m * self.model_dim, divisor) // self.head_dim for m in multipliers
            )
        else:
            q_heads = _layer_counts("num_query_heads", self.num_query_heads, layers)
        if self.num_kv_heads is None:
            for layer, q in enumerate(q_heads):
                if q % self.num_gqa_groups:
                    raise ValueError(
                        f"num_query_heads[{layer}] must be a multiple of num_gqa_groups "
                        f"{self.num_gqa_groups}, got {q}"
                    )
            kv_heads = tuple(q // self.num_gqa_groups for q in q_heads)
        else:
            kv_heads = _layer_counts("num_kv_heads", self.num_kv_heads, layers)
        for layer, (q, kv) in enumerate(zip(q_heads, kv_heads, strict=True)):
            if q % kv:
                raise ValueError(
                    f"num_query_heads[{layer}] must be a multiple of num_kv_heads[{layer}] {kv}, "
                    f"got {q}"
                )
        return q_heads, kv_heads

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The name (CoreNet's) and shape of every parameter.

        Returns:
            {name: shape}, in the model's order.
        """
        dim = self.model_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embeddings.weight": (self.vocab_size, dim)}
        for i in range(self.num_transformer_layers):
            q_heads, kv_heads, ffn = self.num_query_heads[i], self.num_kv_heads[i], self.ffn_dims[i]
            layer = {"attn.qkv_proj": ((q_heads + 2 * kv_heads) * self.head_dim, dim)}
            layer["attn.out_proj"] = (dim, q_heads * self.head_dim)
            if self.normalize_qk_projections:
                layer["attn.q_norm"] = layer["attn.k_norm"] = (self.head_dim,)
            layer["ffn.proj_1"] = (2 * ffn if self.ffn_with_glu else ffn, dim)
            layer["ffn.proj_2"] = (dim, ffn)
            layer["attn_norm"] = layer["ffn_norm"] = (dim,)
            shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["norm.weight"] = (dim,)
        if not self.share_input_output_layers:
            shapes["classifier.weight"] = (self.vocab_size, dim)
        return shapes

    @property
    def num_parameters(self) -> int:
        """How many numbers a model of this shape holds."""
        return sum(prod(shape) for shape in self.parameter_shapes().values())

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "OpenELMConfig":
        """The shape of one of Apple's models.

        Args:
            name: one of VARIANTS, as "OpenELM-270M".
            overrides: fields that get other values.

        Returns:
            The configuration.

        Raises:
            ValueError: there is no variant of that name.
        """
        if not isinstance(name, str) or name not in _VARIANT_SHAPES:
            raise ValueError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}")
        layers, model_dim, head_dim = _VARIANT_SHAPES[name]
        shape = dict(
            num_transformer_layers=layers,
            model_dim=model_dim,
            head_dim=head_dim,
            num_gqa_groups=4,
            qkv_multipliers=(0.5, 1.0),
            ffn_multipliers=(0.5, 4.0),
            normalize_qk_projections=True,
            share_input_output_layers=True,
            model_name=name,
        )
        return cls(**shape | overrides)

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> "OpenELMConfig":
        """The shape that a Hugging Face config.json gives.

        Args:
            values: what the file holds; keys that say nothing about the shape are ignored.

        Returns:
            The configuration.

        Raises:
            ValueError: it is of another type of model, or lacks a key.
        """
        model_type = values.get("model_type")
        if model_type != "openelm":
            raise ValueError(f"model_type must be 'openelm', got {model_type!r}")
        missing = [name for name in _HF_REQUIRED if name not in values]
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        known = {f.name for f in fields(cls) if f.init} - {"model_name"}
        return cls(**{name: values[name] for name in known if name in values})

    def to_hf_dict(self) -> dict[str, Any]:
        """What a Hugging Face config.json says.

        Returns:
            Apple's keys, and those that Apple's lacks only if they differ from what Apple's has.
        """
        hidden = {"ffn_dims", "model_name", "norm_eps", "padding_index"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        values |= {
            "architectures": ["OpenELMForCausalLM"],
            "model_type": "openelm",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if not self.share_input_output_layers:
            values["tie_word_embeddings"] = False
        if self.norm_eps != 1e-6:
            values["norm_eps"] = self.norm_eps
        if self.padding_index is not None:
            values["padding_index"] = self.padding_index
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(values.items())}

    @classmethod
    def from_corenet_yaml(cls, source: Mapping[str, Any] | str | Path) -> "OpenELMConfig":
        """The shape that a CoreNet training configuration gives.

        Args:
            source: the YAML's path or what it holds. Under model.language_modeling.general_gpt it
                names one of VARIANTS, and may override vocabulary, context and padding index.

        Returns:
            The configuration.

        Raises:
            ImportError: PyYAML isn't installed.
            ValueError: it is no such configuration.
        """
        if isinstance(source, Mapping):
            origin, values = "the configuration", source
        else:
            origin, values = str(source), read_yaml(Path(source))
        section, walked = values, []
        for key in ("model", "language_modeling", "general_gpt"):
            walked.append(key)
            if not isinstance(section, Mapping) or key not in section:
                raise ValueError(f"{origin} has no section {'.'.join(walked)}")
            section = section[key]
        if not isinstance(section, Mapping) or "model_name" not in section:
            raise ValueError(f"{origin} has no model.language_modeling.general_gpt.model_name")
        names = ("vocab_size", "max_context_length", "padding_index")
        overrides = {n: section[n] for n in names if section.get(n) is not None}
        return cls.from_name(section["model_name"], **overrides)

    def __str__(self) -> str:
        return json.dumps(self.to_hf_dict(), indent=1)


def _check_positive_integer(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if value > _LARGEST:
        bits = int(value).bit_length()  # it may have thousands of digits
        raise ValueError(f"{name} must be at most {_LARGEST}, got an integer of {bits} bits")


def _layer_counts(name: str, counts: Any, layers: int) -> tuple[int, ...]:
    if isinstance(counts, str) or not isinstance(counts, Sequence):
        raise TypeError(f"{name} must be a list of {layers} integers, got {counts!r}")
    if len(counts) != layers:
        raise ValueError(
            f"{name} must have {layers} entries (num_transformer_layers), got {len(counts)}"
        )
    for layer, count in enumerate(counts):
        _check_positive_integer(f"{name}[{layer}]", count)
    return tuple(int(count) for count in counts)
