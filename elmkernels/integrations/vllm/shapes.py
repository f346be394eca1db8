"""What differs from layer to layer, in numbers that an engine needs; nothing here knows vLLM."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ...backends import Reason
from ...openelm.compressed import STORED_FORMS
from ...openelm.config import OpenELMConfig

FIELDS = tuple(f.name for f in fields(OpenELMConfig) if f.init and f.name != "model_name")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


class Heads(NamedTuple):
    """How many heads a layer has."""

    query: int
    key_value: int


def shape_of(values: Mapping[str, Any]) -> OpenELMConfig:
    """The shape that attributes of a configuration give, whichever class holds them.

    Args:
        values: by Apple's names; others are passed over.

    Raises:
        TypeError, ValueError: a value is of a wrong type or out of its range.
    """
    return OpenELMConfig(**{name: values[name] for name in FIELDS if name in values})


def heads(shape: OpenELMConfig, layer: int, tensor_parallel: int = 1) -> Heads:
    """A layer's heads on one of the processes that share it. A key/value head that is shared by
    several of them is on each.
    """
    query, key_value = shape.num_query_heads[layer], shape.num_kv_heads[layer]
    return Heads(query // tensor_parallel, max(1, key_value // tensor_parallel))


def cache_bytes(shape: OpenELMConfig, itemsize: int, tensor_parallel: int = 1) -> list[int]:
    """The bytes that a token takes in each layer's cache.

    Args:
        shape: of the model.
        itemsize: bytes of a number in the cache.
        tensor_parallel: how many processes share a layer.
    """
    layers = range(shape.num_transformer_layers)
    kept = (heads(shape, layer, tensor_parallel).key_value for layer in layers)
    return [2 * count * shape.head_dim * itemsize for count in kept]


def missing_tensor_parallel(shape: OpenELMConfig, size: int) -> Reason | None:
    """Why `size` processes can't share each layer, and what can be done; None if they can."""
    found = []
    for layer, (query, key_value, ffn) in enumerate(
        zip(shape.num_query_heads, shape.num_kv_heads, shape.ffn_dims, strict=True)
    ):
        if query % size or (key_value % size and size % key_value):
            found.append(f"layer {layer} has {query} query and {key_value} key/value heads")
        elif ffn % size:
            found.append(f"layer {layer} has {ffn} columns in its feed-forward")
    if not found:
        return None
    layers = shape.num_transformer_layers
    shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
    stages = f"--pipeline-parallel-size {size} or " if size <= layers else ""
    return (
        f"--tensor-parallel-size {size} does not divide {len(found)} of {layers} layers ({shown}): "
        f"use {stages}--data-parallel-size {size}"
    )


def missing_pipeline(shape: OpenELMConfig, stages: int) -> Reason | None:
    """Why the layers can't be cut into so many stages; None if they can."""
    layers = shape.num_transformer_layers
    if stages <= layers:
        return None
    return f"--pipeline-parallel-size must be at most the {layers} layers, got {stages}"


def missing_length(shape: OpenELMConfig, length: int) -> Reason | None:
    """Why a context can't be so long; None if it can."""
    if length <= shape.rope_max_length:
        return None
    return (
        f"--max-model-len must be at most the {shape.rope_max_length} positions of the rotary "
        f"table (rope_max_length), got {length}"
    )


def missing_form(values: Mapping[str, Any], folder: str) -> Reason | None:
    """Why weights that are stored so aren't served, and the command that makes them plain; None
    if they are plain.

    Args:
        values: of config.json.
        folder: its name, for the command.
    """
    for word, form in STORED_FORMS.items():
        if values.get(word) is not None:
            return (
                f"{folder} holds {form.label} weights, vLLM serves plain ones: "
                f"elmkernels convert --checkpoint {folder} --to plain --out {folder}-plain"
            )
    return None


def missing_tokenizer(folder: str) -> Reason | None:
    """Why a tokenizer can't be made from a folder on this machine, and what can be done; None if
    there is one, or the name is no folder.
    """
    path = Path(folder)
    if not path.is_dir() or any((path / name).is_file() for name in TOKENIZERS):
        return None
    return (
        f"{folder} holds no tokenizer: --tokenizer FOLDER names one (OpenELM's is Llama 2's), or "
        "--skip-tokenizer-init serves token ids alone"
    )
