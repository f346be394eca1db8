"""Every model shape, once: from a few numbers to the head counts and widths of each layer.

OpenELM scales its layers: with multipliers (a, b) layer i of n gets
m_i = round(linspace(a, b, n)[i], 2), and from it

    q_heads = make_divisible(m_i model_dim, head_dim num_gqa_groups) / head_dim
    kv_heads = q_heads / num_gqa_groups
    ffn_dim = make_divisible(m_i model_dim, ffn_dim_divisor)

Field names are CoreNet's, which the Hugging Face checkpoints use as well.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

from ..checks import is_integer
from ..text.metadata import BOS, EOS, Metadata, token_ids
from ..text.shapes import (
    LARGEST,
    boolean,
    expand_multipliers,
    layer_counts,
    make_divisible,
    number,
    plain,
    size,
)
from ..weights.texts import read_yaml

_VARIANT_SHAPES = {  # layers, model_dim, head_dim
    "OpenELM-270M": (16, 1280, 64),
    "OpenELM-450M": (20, 1536, 64),
    "OpenELM-1_1B": (28, 2048, 64),
    "OpenELM-3B": (36, 3072, 128),
}
VARIANTS = tuple(_VARIANT_SHAPES)


def variant_name(name: Any) -> str | None:
    """The full name of one of VARIANTS: OpenELM-1_1B for 1.1b, None if it is none."""
    if not isinstance(name, str):
        return None
    full = "OpenELM-" + name.upper().removeprefix("OPENELM-").replace(".", "_")
    return full if full in VARIANTS else None


_HF_REQUIRED = ("num_transformer_layers", "model_dim", "head_dim", "vocab_size")


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
    # None is what one may give; whoever reads these fields finds numbers.
    num_query_heads: Sequence[int] = None  # pyright: ignore[reportAssignmentType]
    num_kv_heads: Sequence[int] = None  # pyright: ignore[reportAssignmentType]
    model_name: str | None = None
    ffn_dims: tuple[int, ...] = field(init=False)
    # No field: it is no part of the shape, which alone is compared.
    metadata = Metadata()

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
            self._set(name, size(name, getattr(self, name)))
        for name in ("norm_eps", "rope_freq_constant"):
            self._set(name, number(name, getattr(self, name)))
        for name in ("ffn_with_glu", "normalize_qk_projections", "share_input_output_layers"):
            self._set(name, boolean(name, getattr(self, name)))
        if not isinstance(self.model_name, str | None):
            raise TypeError(f"model_name must be text or None, got {self.model_name!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates halves), got {self.head_dim}")
        if self.activation_fn_name != "swish":
            raise ValueError(f"activation_fn_name must be 'swish', got {self.activation_fn_name!r}")
        if self.normalization_layer_name != "rms_norm":
            raise ValueError(
                "normalization_layer_name must be 'rms_norm', "
                f"got {self.normalization_layer_name!r}"
            )
        if (index := self.padding_index) is not None:
            if not is_integer(index) or not 0 <= index < self.vocab_size:
                raise ValueError(f"padding_index must lie in [0, {self.vocab_size}), got {index!r}")
            self._set("padding_index", int(index))
        ffn = self._widths("ffn_multipliers", self.ffn_multipliers)
        q_heads, kv_heads = self._heads(self.num_query_heads, self.num_kv_heads)
        derived: dict[str, Any] = {
            "ffn_multipliers": ffn,
            "ffn_dims": tuple(
                make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in ffn
            ),
            "num_query_heads": q_heads,
            "num_kv_heads": kv_heads,
        }
        qkv = self.qkv_multipliers
        derived["qkv_multipliers"] = (
            tuple(map(plain, qkv)) if isinstance(qkv, Sequence) else plain(qkv)
        )
        for name, value in derived.items():
            self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _widths(self, name: str, multipliers: float | Sequence[float]) -> tuple[float, ...]:
        """One multiplier a layer, each of which gives a width that can be."""
        expanded = expand_multipliers(name, multipliers, self.num_transformer_layers)
        if max(expanded) * self.model_dim > LARGEST:
            raise ValueError(
                f"{name} must be at most {LARGEST / self.model_dim:g} for model_dim "
                f"{self.model_dim}, got {max(expanded):g}"
            )
        return expanded

    def _heads(
        self, query: Sequence[int] | None, key_value: Sequence[int] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layers = self.num_transformer_layers
        multipliers = self._widths("qkv_multipliers", self.qkv_multipliers)
        if query is None:
            divisor = self.head_dim * self.num_gqa_groups
            q_heads = tuple(
                make_divisible(m * self.model_dim, divisor) // self.head_dim for m in multipliers
            )
        else:
            q_heads = layer_counts("num_query_heads", query, layers)
        if key_value is None:
            for layer, q in enumerate(q_heads):
                if q % self.num_gqa_groups:
                    raise ValueError(
                        f"num_query_heads[{layer}] must be a multiple of num_gqa_groups "
                        f"{self.num_gqa_groups}, got {q}"
                    )
            kv_heads = tuple(q // self.num_gqa_groups for q in q_heads)
        else:
            kv_heads = layer_counts("num_kv_heads", key_value, layers)
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
            layer: dict[str, tuple[int, ...]] = {
                "attn.qkv_proj": ((q_heads + 2 * kv_heads) * self.head_dim, dim),
                "attn.out_proj": (dim, q_heads * self.head_dim),
            }
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
    def bos_token_id(self) -> int | None:
        """The id that a text begins with, None for none."""
        return token_ids(self.metadata.values)[0]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: those of config.json and of generation_config.json."""
        return tuple(token_ids(self.metadata.values, self.metadata.generation)[1])

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills a batch up, None for none."""
        found = self.metadata.values.get("pad_token_id")
        return None if found is None or found < 0 else int(found)

    def with_metadata(self, metadata: Metadata) -> "OpenELMConfig":
        """This shape, saved with what another checkpoint says.

        Args:
            metadata: what is said; keys of the shape are passed over.

        Returns:
            The configuration.
        """
        shape = {f.name for f in fields(self)}
        values = {key: value for key, value in metadata.values.items() if key not in shape}
        other = copy.copy(self)
        object.__setattr__(other, "metadata", Metadata(values, metadata.files))
        return other

    @property
    def num_parameters(self) -> int:
        """How many numbers a model of this shape holds."""
        return sum(prod(shape) for shape in self.parameter_shapes().values())

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "OpenELMConfig":
        """The shape of one of Apple's models.

        Args:
            name: one of VARIANTS, as "OpenELM-270M", or short, as "270M" or "1.1b".
            overrides: fields that get other values.

        Returns:
            The configuration.

        Raises:
            ValueError: there is no variant of that name.
        """
        full = variant_name(name)
        if full is None:
            raise ValueError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}")
        layers, model_dim, head_dim = _VARIANT_SHAPES[full]
        shape: dict[str, Any] = dict(
            num_transformer_layers=layers,
            model_dim=model_dim,
            head_dim=head_dim,
            num_gqa_groups=4,
            qkv_multipliers=(0.5, 1.0),
            ffn_multipliers=(0.5, 4.0),
            normalize_qk_projections=True,
            share_input_output_layers=True,
            model_name=full,
        )
        return cls(**shape | overrides)

    @classmethod
    def from_hf_dict(
        cls, values: Mapping[str, Any], beside: Mapping[str, bytes] | None = None
    ) -> "OpenELMConfig":
        """The shape that a Hugging Face config.json gives.

        Args:
            values: what the file holds; keys that say nothing about the shape or the stored weights
                are kept, and `to_hf_dict` says them again.
            beside: the files that are saved with it, by name (tokenizers, generation_config.json).

        Returns:
            The configuration.

        Raises:
            TypeError, ValueError: it is of another type of model, lacks a key, or a value is wrong.
        """
        model_type = values.get("model_type")
        if model_type != "openelm":
            raise ValueError(f"model_type must be 'openelm', got {model_type!r}")
        missing = [name for name in _HF_REQUIRED if name not in values]
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        known = {f.name for f in fields(cls) if f.init} - {"model_name"}
        config = cls(**{name: values[name] for name in known if name in values})
        object.__setattr__(config, "metadata", Metadata(values, beside or {}))
        return config

    def to_hf_dict(self) -> dict[str, Any]:
        """What a Hugging Face config.json says.

        Returns:
            What `from_hf_dict` was given, if the configuration was made so; else Apple's keys, and
            those that Apple's lacks only if they differ from what Apple's has.
        """
        hidden = {"ffn_dims", "model_name", "norm_eps", "padding_index"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        values |= {
            "architectures": ["OpenELMForCausalLM"],
            "model_type": "openelm",
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if not self.share_input_output_layers:
            values["tie_word_embeddings"] = False
        if self.norm_eps != 1e-6:
            values["norm_eps"] = self.norm_eps
        if self.padding_index is not None:
            values["padding_index"] = self.padding_index
        values |= copy.deepcopy(self.metadata.values)
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
