"""Checkpoints: Hugging Face folders, read and written, and CoreNet's .pt files, read.

The folder holds config.json and either model.safetensors or shards with an index; its keys are
CoreNet's with a `transformer.` prefix, the untied classifier is `lm_head.weight`. A CoreNet file
is a state dict, bare or (a training checkpoint) under `model_state_dict`.

Compressed weights have several tensors each, and a word in config.json:

    "quantization": {"group_size", "bits"}              MLX's own: NAME.{weight, scales, biases}
    "elmkernels": {"format": "packed12", "version": 1}  NAME.{packed, exponents, escape_starts,
                                                              escape_columns, escape_values}

A matrix without `scales` or `packed` is plain. Loading checks every key and shape before it reads
a weight, and reports all that is wrong at once. Weights are mapped from the file, not copied,
where neither dtype nor device changes. Saving replaces a folder in one step (see `storage`).
What else the folder says (see `metadata`) is loaded with the configuration and saved with it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import is_integer, to_dtype
from ..devices import check_here
from ..text.hub import local_path
from ..text.metadata import CONFIG, files_beside, raw_config
from ..weights import storage
from ..weights.storage import DTYPE_NAMES, FLOATS, INDEX, WEIGHTS, Folder, Stored
from .compressed import STORED_FORMS, Compressed, weight_of
from .config import VARIANTS, OpenELMConfig, variant_name
from .progress import progress

MOST_PROBLEMS = 4  # that one error names


class Scheme(NamedTuple):
    """How the matrices of a folder are compressed: the form, and its own values in config.json."""

    form: type[Compressed]
    values: dict[str, Any]

    def __str__(self) -> str:
        return str(self.values)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's parts: the shape, the tensors by their names in the model, and the modules of
    compressed matrices, which hold theirs.
    """

    config: OpenELMConfig
    weights: dict[str, Tensor]
    modules: dict[str, Compressed]


def load(
    path: str | Path,
    *,
    config: OpenELMConfig | Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Loaded:
    """The parts of a Hugging Face folder, or of one CoreNet (.pt) or safetensors file with its
    `config`: an OpenELMConfig, a CoreNet YAML (parsed or its path) or a variant's name. Weights
    keep their stored dtype unless `dtype` is given; of quantized ones that is the dtype of scales
    and biases, and packed ones are bfloat16 and nothing else.
    """
    dtype = to_dtype("dtype", dtype)
    path = local_path(path)
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"path must be a folder or a file, {path} is neither")
    scheme = None
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config must not be given with a folder: {path / CONFIG} is read")
        folder = Folder(path)
        values = raw_config(path)
        stored = storage.folder_weights(folder)
        config, scheme = _folder_config(folder, values, len(stored))
    else:
        config = _given_config(config, path)
        is_safetensors = path.suffix == ".safetensors"
        read = storage.read_safetensors if is_safetensors else storage.read_torch_file
        stored = read(path)
    only = None if scheme is None else scheme.form.only_dtype
    if scheme is not None and only is not None and dtype not in (None, only):
        raise ValueError(
            f"dtype must be {str(only).removeprefix('torch.')} (or None) for the "
            f"{scheme.form.label} weights of {path}, got {dtype}: "
            "load them as they are, elmkernels.unpack(model), then cast"
        )
    chosen = _match(config, scheme, stored, path)
    device = torch.get_default_device() if device is None else torch.device(device)
    check_here(device)
    weights = {}
    for name in progress(chosen, f"loading {path.name}"):
        weight = chosen[name].read()
        _check_held(chosen[name], weight, device)
        wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        weights[name] = weight.to(device=device, dtype=wanted).contiguous()
    marks = tuple(f".{form.mark}" for form in STORED_FORMS.values())
    names = [name.rpartition(".")[0] for name in weights if name.endswith(marks)]
    shapes = config.parameter_shapes()
    modules = {}
    if scheme is not None:  # else there are no such names, `_match` has seen to it
        modules = {
            name: _take_module(name, weights, scheme, shapes[f"{name}.weight"][1], path)
            for name in names
        }
    return Loaded(config, weights, modules)


def _take_module(
    name: str, weights: dict[str, Tensor], scheme: Scheme, columns: int, path: Path
) -> Compressed:
    """The module of a compressed matrix, which takes its tensors out of `weights`."""
    names = scheme.form.stored((1, columns), scheme.values)
    tensors = [weights.pop(f"{name}.{part}") for part in names]
    try:
        made = scheme.form.loaded(name, tensors, columns, scheme.values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {name} is damaged: {error}") from error
    if scheme.form.only_dtype is not None:
        made.dtype = weights["norm.weight"].dtype
    return made


def save(
    model: nn.Module, config: OpenELMConfig, path: str | Path, *, max_shard_bytes: int | None = None
) -> None:
    """Write a Hugging Face folder, in place of a checkpoint that is already there, even of the one
    that the model is mapped from. A file over max_shard_bytes is split between tensors.

    A quantized model's folder is MLX's as well: `mlx_lm` loads it.
    """
    folder = Path(path)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, {folder} is a file")
    weights = _weights_to_save(model, config)
    shards = _split(weights, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [WEIGHTS]
    texts = {CONFIG: config.to_hf_dict() | _scheme_to_save(model)}
    texts[CONFIG]["torch_dtype"] = str(model.get_parameter("norm.weight").dtype).split(".")[-1]
    if count > 1:
        weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(weight.nbytes for weight in weights.values())
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    writers = {
        name: partial(
            storage.write_safetensors,
            weights=shard,
            shown=partial(progress, what=f"saving {folder.name}/{name}"),
        )
        for name, shard in zip(names, shards, strict=True)
    }
    writers |= {name: partial(storage.write_json, values=text) for name, text in texts.items()}
    beside = config.metadata.files
    writers |= {name: partial(_write_file, data=beside[name]) for name in beside}
    storage.replace_files(folder, writers)


def _write_file(file: Path, data: bytes) -> None:
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def read_config(path: str | Path) -> OpenELMConfig:
    """The shape that a checkpoint's folder gives, with all else that it says. Raises
    FileNotFoundError, ValueError or TypeError.
    """
    path = local_path(path)
    folder = Folder(path)
    return _folder_config(folder, raw_config(path), len(storage.folder_weights(folder)))[0]


def _check_held(stored: Stored, weight: Tensor, device: torch.device) -> None:
    """Raise ValueError for a tensor whose strides repeat a few stored bytes: it would cost more
    memory than its file has. ("meta" costs none.)
    """
    held = weight.untyped_storage().nbytes()
    if device.type != "meta" and weight.nbytes > held:
        raise ValueError(
            f"{stored.file}: {stored.key} must be stored in {weight.nbytes} bytes, got {held}"
        )


def _folder_config(
    folder: Folder, values: Mapping[str, Any], tensors: int
) -> tuple[OpenELMConfig, Scheme | None]:
    """The shape, and how the weights are compressed. tensors: how many are stored; a layer has
    some, so that more layers than those are refused before anything is made for each.
    """
    try:
        layers = values.get("num_transformer_layers")
        if is_integer(layers) and layers > tensors:
            raise ValueError(
                f"num_transformer_layers must be at most the {tensors} tensors stored, got {layers}"
            )
        beside = files_beside(folder.path, folder.find, values)
        return OpenELMConfig.from_hf_dict(values, beside), _scheme(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.path / CONFIG}: {error}") from error


def _scheme(values: Mapping[str, Any]) -> Scheme | None:
    """What config.json says of compression, if anything."""
    given = {word: values[word] for word in STORED_FORMS if values.get(word) is not None}
    if len(given) > 1:
        words = " and ".join(f"`{word}`" for word in given)
        raise ValueError(f"{words} exclude each other, both are given")
    for word, value in given.items():
        return Scheme(STORED_FORMS[word], STORED_FORMS[word].read_scheme(value))
    return None


def _given_config(config: Any, path: Path) -> OpenELMConfig:
    if isinstance(config, OpenELMConfig):
        return config
    if isinstance(config, Mapping):
        return OpenELMConfig.from_corenet_yaml(config)
    if variant_name(config) is not None:
        return OpenELMConfig.from_name(config)
    if isinstance(config, (str, Path)) and Path(config).is_file():
        return OpenELMConfig.from_corenet_yaml(Path(config))
    if config is None and path.suffix == ".gguf":
        raise ValueError(
            f"path must be a checkpoint folder, got the GGUF file {path}, which is written for "
            "llama.cpp and not read here"
        )
    if config is None and (path.parent / CONFIG).is_file():
        raise ValueError(
            f"path must be the folder {path.parent}, which holds {CONFIG}, got its file "
            f"{path.name} (which can be loaded with a config of its own)"
        )
    raise ValueError(
        f"config must be an OpenELMConfig, a CoreNet YAML file or one of {', '.join(VARIANTS)} "
        f"to load the single file {path}, got {config!r}"
    )


def _expected(
    config: OpenELMConfig, scheme: Scheme | None, names: set[str], path: Path
) -> dict[str, tuple[tuple[int | None, ...], str | None]]:
    """Every tensor that must be there, given the names of those that are."""
    expected = {}
    form = None if scheme is None else scheme.form
    found = set()
    for name, shape in config.parameter_shapes().items():
        module = name.removesuffix(".weight")
        forms = STORED_FORMS.values()
        marked = next((f for f in forms if f"{module}.{f.mark}" in names), None)
        if marked is None or len(shape) != 2:
            expected[name] = shape, None
            continue
        found.add(marked)
        if scheme is not None and marked is form:
            parts = marked.stored(shape, scheme.values)
            expected |= {f"{module}.{part}": value for part, value in parts.items()}
    for other in found - {form}:
        raise ValueError(f"{path} holds {other.label} weights, but no {CONFIG} with `{other.word}`")
    if form is not None and form not in found:
        raise ValueError(f"{path / CONFIG} says {scheme}, but no weight is stored so")
    return expected


def _match(
    config: OpenELMConfig, scheme: Scheme | None, stored: Sequence[Stored], path: Path
) -> dict[str, Stored]:
    """The stored tensor of every name, or one error with all that doesn't fit."""

    def short(key: str) -> str:
        name = key.removeprefix("transformer.")
        return f"classifier.{name[8:]}" if name.startswith("lm_head.") else name

    expected = _expected(config, scheme, {short(s.key) for s in stored}, path)
    prefix = "transformer." if any(s.key.startswith("transformer.") for s in stored) else ""
    chosen: dict[str, Stored] = {}
    problems = []
    for s in stored:
        name = short(s.key)
        if name not in expected or name in chosen:
            problems.append(f"unexpected: {s.key} {list(s.shape)} in {s.file.name}")
            continue
        chosen[name] = s
        shape, dtype = expected[name]
        if len(s.shape) != len(shape) or any(
            e not in (None, got) for e, got in zip(shape, s.shape, strict=True)
        ):
            how = "" if scheme is None else f" (of {scheme})"
            problems.append(
                f"shape: {s.key} must be {_text(shape)}{how}, got {list(s.shape)} in {s.file.name}"
            )
        elif s.dtype != dtype if dtype else s.dtype not in FLOATS:
            problems.append(f"dtype: {s.key} must be {dtype or 'floating point'}, got {s.dtype}")
    for name in expected.keys() - chosen.keys():
        key = prefix + name
        if prefix and name.startswith("classifier."):
            key = name.replace("classifier.", "lm_head.")
        problems.append(f"missing: {key} {_text(expected[name][0])}")
    if problems:
        first, more = sorted(problems)[:MOST_PROBLEMS], len(problems) - MOST_PROBLEMS
        rest = (f"and {more} more",) if more > 0 else ()
        named = ";\n  ".join((*first, *rest))
        raise ValueError(f"{path} does not fit its configuration:\n  {named}")
    return {name: chosen[name] for name in expected}


def _text(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _compressed(model: nn.Module) -> dict[str, Compressed]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Compressed)}


def _scheme_to_save(model: nn.Module) -> dict[str, Any]:
    """config.json's word on compressed weights."""
    schemes = []
    for name, module in _compressed(model).items():
        scheme = {module.word: module.scheme()}
        if schemes and scheme != schemes[0]:
            raise ValueError(
                f"a folder holds one form of weights, {name} has {scheme} beside {schemes[0]}"
            )
        schemes.append(scheme)
    return schemes[0] if schemes else {}


def _weights_to_save(model: nn.Module, config: OpenELMConfig) -> dict[str, Tensor]:
    """Name in the file -> tensor."""
    state, names = model.state_dict(), []
    different = []
    compressed = _compressed(model)
    for name, shape in config.parameter_shapes().items():
        module = compressed.get(name.removesuffix(".weight"))
        parts = (
            [name]
            if module is None
            else [f"{name.removesuffix('.weight')}.{part}" for part in module.names]
        )
        names += parts
        if all(part in state for part in parts):
            got = state[name].shape if module is None else weight_of(module).shape
            different += [name] * (got != shape)
    different = sorted(state.keys() ^ set(names)) + different
    if different:
        raise ValueError(
            f"the model's state_dict is not its configuration's: {', '.join(different)}"
        )
    for name in names:
        known = DTYPE_NAMES if name.rpartition(".")[0] in compressed else FLOATS.values()
        if state[name].dtype not in known:
            raise ValueError(f"{name} must be floating point, got {state[name].dtype}")
    return {
        name.replace("classifier.", "lm_head.")
        if name.startswith("classifier.")
        else f"transformer.{name}": state[name]
        for name in names
    }


def _split(weights: Mapping[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, weight in weights.items():
        if shards[-1] and max_bytes is not None and size + weight.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = weight
        size += weight.nbytes
    return shards
