"""OpenELM's configuration as transformers wants it: Apple's keys, transformers' own names beside
them, and what differs from layer to layer where transformers looks for it.
"""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from ... import openelm
from ...checks import fail
from .folders import only_here

_SHAPE = tuple(f.name for f in fields(openelm.OpenELMConfig) if f.init and f.name != "model_name")
# Apple's keys that say nothing about the shape, and what they are in its models.
_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "use_cache": True}
# What follows from the shape: transformers asks for it, no file holds it.
_DERIVED = (
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "per_layer_config",
    "_heterogeneity_spec", "allow_global_per_layer_attribute_access",
)  # fmt: skip


class OpenELMConfig(PreTrainedConfig):
    """The configuration of an `OpenELMForCausalLM`, as a folder's config.json holds it.

    Every key of `elmkernels.OpenELMConfig` is an attribute, checked when it is made. transformers'
    own names are there too: hidden_size, num_hidden_layers, max_position_embeddings (the tokens
    that the model was trained with), tie_word_embeddings, and for each layer, in
    `per_layer_config[i]`, num_attention_heads, num_key_value_heads and intermediate_size, whose
    values in the configuration itself are those of the widest layer.

    Args:
        values: keys of `elmkernels.OpenELMConfig`, and any of transformers' own.

    Raises:
        TypeError, ValueError: a value is of a wrong type or out of its range.

    Example:
        >>> config = OpenELMConfig.from_name("OpenELM-270M")
        >>> config.hidden_size, config.per_layer_config[0].num_attention_heads
        (1280, 12)
    """

    model_type = "openelm"
    auto_map = {}  # of a folder without its own; TRL and the Auto classes look into it
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(self, **values: Any) -> None:
        for theirs, name in self.attribute_map.items():
            if theirs in values:
                values.setdefault(name, values.pop(theirs))
        given = {name: values.pop(name) for name in _SHAPE if name in values}
        tied = values.pop("tie_word_embeddings", None)
        for name in _DERIVED:
            values.pop(name, None)
        for name, default in _DEFAULTS.items():
            setattr(self, name, values.pop(name, default))
        self._take(openelm.OpenELMConfig(**given))
        super().__init__(**values)
        if tied is not None and tied != self.share_input_output_layers:
            fail("tie_word_embeddings", f"{self.share_input_output_layers} "
                 "(share_input_output_layers)", tied)  # fmt: skip
        self.tie_word_embeddings = self.share_input_output_layers
        self._set_layers()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """The configuration of a folder, or of a repository that the hub's cache here holds.

        Args:
            pretrained_model_name_or_path: a folder, a file or a repository's name;
                `local_files_only=False` lets transformers ask the hub for a name.
            options: of transformers' from_pretrained.

        Returns:
            The configuration, as transformers returns it.

        Raises:
            FileNotFoundError: the cache doesn't hold it, with the command that fetches it.
        """
        only_here(pretrained_model_name_or_path, options, ("config.json",))
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "OpenELMConfig":
        """The configuration of one of Apple's models.

        Args:
            name: "OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B" or "OpenELM-3B".
            overrides: keys that get other values.

        Returns:
            The configuration.

        Raises:
            ValueError: there is no model of that name.
        """
        return cls.from_shape(openelm.OpenELMConfig.from_name(name, **overrides))

    @classmethod
    def from_shape(cls, shape: openelm.OpenELMConfig, **values: Any) -> "OpenELMConfig":
        """The configuration of a model of this package.

        Args:
            shape: the model's own configuration.
            values: any of transformers' own keys.

        Returns:
            The configuration.
        """
        return cls(**{name: getattr(shape, name) for name in _SHAPE}, **values)

    @property
    def shape(self) -> openelm.OpenELMConfig:
        """The same as a model of this package takes it, checked anew."""
        return openelm.OpenELMConfig(**{name: getattr(self, name) for name in _SHAPE})

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: all of Apple's keys, whether they are the default or not.

        Returns:
            The keys and their values.
        """
        values = {k: v for k, v in super().to_dict().items() if k not in _DERIVED}
        return self._with_shape(values)

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and all that says the shape.

        Returns:
            The keys and their values.
        """
        values = {k: v for k, v in super().to_diff_dict().items() if k not in _DERIVED}
        values |= {name: getattr(self, name) for name in _DEFAULTS}
        return self._with_shape(values)

    def _with_shape(self, values: dict[str, Any]) -> dict[str, Any]:
        said = self.shape.to_hf_dict()
        values = {k: v for k, v in values.items() if k not in _SHAPE}
        values |= {k: v for k, v in said.items() if k in (*_SHAPE, "model_type")}
        if self.share_input_output_layers:
            values.pop("tie_word_embeddings", None)
        return values

    def _take(self, shape: openelm.OpenELMConfig) -> None:
        for name in _SHAPE:
            value = getattr(shape, name)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def _set_layers(self) -> None:
        """What transformers asks of each layer, and of the whole: the widest layer's."""
        layers = {
            "num_attention_heads": self.num_query_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": list(self.shape.ffn_dims),
        }
        for name, values in layers.items():
            setattr(self, name, max(values))
        count = self.num_transformer_layers
        self.allow_global_per_layer_attribute_access = True
        self.per_layer_config = {
            i: {name: values[i] for name, values in layers.items()} for i in range(count)
        }

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a folder names the installed package (see `folders`), it holds no copy of it.

        Args:
            auto_class: transformers' class that found this one.
        """
