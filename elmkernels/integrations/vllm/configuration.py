"""OpenELM's configuration as vLLM reads it: Apple's keys, vLLM's names beside them, and each
layer's own number of heads.
"""

import copy
from typing import Any

from transformers import PreTrainedConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from .shapes import FIELDS, shape_of


class OpenELMConfig(PreTrainedConfig):
    """config.json of an OpenELM folder. transformers' names stand for the widest layer.

    Args:
        values: keys of `elmkernels.OpenELMConfig`, and any of transformers' own.

    Raises:
        TypeError, ValueError: a value is of a wrong type or out of its range.
    """

    model_type = "openelm"
    attribute_map = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
    }

    def __init__(self, **values: Any) -> None:
        for theirs, name in self.attribute_map.items():
            if theirs in values:
                values.setdefault(name, values.pop(theirs))
        shape = shape_of(values)
        for name in FIELDS:
            values.pop(name, None)
            value = getattr(shape, name)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        self.num_attention_heads = max(shape.num_query_heads)
        self.num_key_value_heads = max(shape.num_kv_heads)
        self.intermediate_size = max(shape.ffn_dims)
        values["tie_word_embeddings"] = shape.share_input_output_layers
        super().__init__(**values)


class ArchConvertor(ModelArchConfigConvertorBase):
    """What vLLM asks of the model as a whole and of each layer."""

    def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]]:
        """A view of the configuration for each layer, with that layer's heads."""
        shape, views = shape_of(vars(self.hf_config)), []
        for query, key_value in zip(shape.num_query_heads, shape.num_kv_heads, strict=True):
            view = copy.copy(self.hf_config)
            view.num_attention_heads, view.num_key_value_heads = query, key_value
            views.append((view, view))
        return views

    def get_total_num_kv_heads(self) -> int:
        """Of one layer in a view of it, of the widest else: `num_kv_heads` is a list."""
        return self.hf_text_config.num_key_value_heads
