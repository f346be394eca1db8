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
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import check_here
from ..weights.affine import check_scheme
from ..weights.formats import SEGMENT_BYTES, SEGMENT_COLUMNS, Affine, Packed12
from ..weights.packed12 import check_packed12
from . import storage
from .compressed import Compressed, packed12_module, quantized_module, weight_of
from .config import VARIANTS, OpenELMConfig
from .progress import progress
from .storage import DTYPE_NAMES, FLOATS, INDEX, WEIGHTS, Folder, Stored

_CONFIG = "config.json"
_PACKED = {"format": "packed12", "version": 1}
_MARKS = {Affine: "scales", Packed12: "packed"}  # the tensor that only this form has


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
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Loaded:
    """The parts of a Hugging Face folder, or of one CoreNet (.pt) or safetensors file with its
    `config`: an OpenELMConfig, a CoreNet YAML (parsed or its path) or a variant's name. Weights
    keep their stored dtype unless `dtype` is given; of quantized ones that is the dtype of scales
    and biases, and packed ones are bfloat16 and nothing else.
    """
    path = Path(path)
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype must be one of {list(FLOATS.values())}, got {dtype}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (a local folder or file; no download)")
    scheme = None
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config must not be given with a folder: {path / _CONFIG} is read")
        folder = Folder(path)
        config, scheme = _folder_config(folder)
        stored = storage.folder_weights(folder)
    else:
        config = _given_config(config, path)
        is_safetensors = path.suffix == ".safetensors"
        read = storage.read_safetensors if is_safetensors else storage.read_torch_file
        stored = read(path)
    if scheme == _PACKED and dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"dtype must be bfloat16 (or None) for the packed weights of {path}, got {dtype}: "
            "load them as they are, elmkernels.unpack(model), then cast"
        )
    chosen = _match(config, scheme, stored, path)
    device = torch.get_default_device() if device is None else torch.device(device)
    check_here(device)
    weights = {}
    for name in progress(chosen, f"loading {path.name}"):
        weight = chosen[name].read()
        wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        weights[name] = weight.to(device=device, dtype=wanted).contiguous()
    names = [n.rpartition(".")[0] for n in weights if n.endswith(tuple(_MARKS.values()))]
    shapes = config.parameter_shapes()
    modules = {
        name: _take_module(name, weights, scheme, shapes[f"{name}.weight"][1], path)
        for name in names
    }
    return Loaded(config, weights, modules)


def _take_module(
    name: str, weights: dict[str, Tensor], scheme: dict[str, Any], columns: int, path: Path
) -> Compressed:
    """The module of a compressed matrix, which takes its tensors out of `weights`."""
    if scheme != _PACKED:
        parts = (weights.pop(f"{name}.{part}") for part in ("weight", "scales", "biases"))
        return quantized_module(name, Affine(*parts, scheme["bits"], scheme["group_size"]))
    parts = (weights.pop(f"{name}.{part}") for part in _parts(Packed12, (1, columns), scheme))
    packed = Packed12(*parts, columns)
    try:
        check_packed12(packed)
    except ValueError as error:
        raise ValueError(f"{path}: {name} is damaged: {error}") from error
    made = packed12_module(name, packed)
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
    texts = {_CONFIG: config.to_hf_dict() | _scheme_to_save(model)}
    texts[_CONFIG]["torch_dtype"] = str(model.norm.weight.dtype).split(".")[-1]
    if count > 1:
        weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(weight.nbytes for weight in weights.values())
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    writers = {
        name: partial(storage.write_safetensors, weights=shard, what=f"saving {folder.name}/{name}")
        for name, shard in zip(names, shards, strict=True)
    }
    writers |= {name: partial(storage.write_json, values=text) for name, text in texts.items()}
    storage.replace_files(folder, writers)


def raw_config(path: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as it stands there. Raises FileNotFoundError or
    ValueError.
    """
    file = Folder(Path(path)).find(_CONFIG)
    if file is None:
        raise FileNotFoundError(f"{Path(path) / _CONFIG} does not exist")
    return storage.read_json(file)


def _folder_config(folder: Folder) -> tuple[OpenELMConfig, dict[str, Any] | None]:
    """The shape, and how the weights are compressed."""
    values = raw_config(folder.path)
    try:
        return OpenELMConfig.from_hf_dict(values), _scheme(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.path / _CONFIG}: {error}") from error


def _scheme(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of compression, if anything."""
    quantized, ours = values.get("quantization"), values.get("elmkernels")
    if quantized is not None and ours is not None:
        raise ValueError("`quantization` and `elmkernels` exclude each other, both are given")
    if ours is not None:
        if ours != _PACKED:
            raise ValueError(f"elmkernels must be {_PACKED}, got {ours!r}")
        return _PACKED
    if quantized is None:
        return None
    if not isinstance(quantized, Mapping) or not {"bits", "group_size"} <= quantized.keys():
        raise ValueError(f"quantization must have bits and group_size, got {quantized!r}")
    mode = quantized.get("mode", "affine")
    others = sorted(quantized.keys() - {"bits", "group_size", "mode"})
    if mode != "affine" or others:
        raise ValueError(
            "quantization must be of mode 'affine' and the same for every matrix, "
            f"got {mode!r}{', and ' * bool(others)}{', '.join(others)}"
        )
    check_scheme(quantized["bits"], quantized["group_size"])
    return {"group_size": quantized["group_size"], "bits": quantized["bits"]}


def _given_config(config: Any, path: Path) -> OpenELMConfig:
    if isinstance(config, OpenELMConfig):
        return config
    if isinstance(config, Mapping):
        return OpenELMConfig.from_corenet_yaml(config)
    if config in VARIANTS:
        return OpenELMConfig.from_name(config)
    if isinstance(config, (str, Path)) and Path(config).is_file():
        return OpenELMConfig.from_corenet_yaml(Path(config))
    raise ValueError(
        f"config must be an OpenELMConfig, a CoreNet YAML file or one of {', '.join(VARIANTS)} "
        f"to load the single file {path}, got {config!r}"
    )


def _parts(
    form: type, shape: tuple[int, int], scheme: dict[str, Any]
) -> dict[str, tuple[tuple[int | None, ...], str | None]]:
    """The tensors of a compressed [n, k] matrix: name -> shape (None: any), dtype (None: float)."""
    n, k = shape
    if form is Affine:
        groups = (n, k // scheme["group_size"])
        words = (n, k * scheme["bits"] // 32)
        return {"weight": (words, "U32"), "scales": (groups, None), "biases": (groups, None)}
    segments = -(-k // SEGMENT_COLUMNS)
    return {
        "packed": ((n, segments, SEGMENT_BYTES), "U8"),
        "exponents": ((16,), "U8"),
        "escape_starts": ((n + 1,), "I32"),
        "escape_columns": ((None,), "I32"),
        "escape_values": ((None,), "BF16"),
    }


def _expected(
    config: OpenELMConfig, scheme: dict[str, Any] | None, names: set[str], path: Path
) -> dict[str, tuple[tuple[int | None, ...], str | None]]:
    """Every tensor that must be there, as `_parts` says it, given the names of those that are."""
    expected = {}
    form = None if scheme is None else Packed12 if scheme == _PACKED else Affine
    found = set()
    for name, shape in config.parameter_shapes().items():
        module = name.removesuffix(".weight")
        mark = next((f for f, part in _MARKS.items() if f"{module}.{part}" in names), None)
        if mark is None or len(shape) != 2:
            expected[name] = shape, None
            continue
        found.add(mark)
        if mark is form:
            parts = _parts(form, shape, scheme)
            expected |= {f"{module}.{part}": value for part, value in parts.items()}
    for other in found - {form}:
        what, word = {Affine: ("quantized", "quantization"), Packed12: ("packed", "elmkernels")}[
            other
        ]
        raise ValueError(f"{path} holds {what} weights, but no {_CONFIG} with `{word}`")
    if form is not None and form not in found:
        raise ValueError(f"{path / _CONFIG} says {scheme}, but no weight is stored so")
    return expected


def _match(
    config: OpenELMConfig, scheme: dict[str, Any] | None, stored: Sequence[Stored], path: Path
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
        raise ValueError(
            "\n  ".join((f"{path} does not fit its configuration:", *sorted(problems)))
        )
    return {name: chosen[name] for name in expected}


def _text(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _compressed(model: nn.Module) -> dict[str, Compressed]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Compressed)}


def _scheme_to_save(model: nn.Module) -> dict[str, Any]:
    """config.json's word on compressed weights."""
    schemes = []
    for name, module in _compressed(model).items():
        weight = module.compressed()
        if isinstance(weight, Packed12):
            scheme = {"elmkernels": _PACKED}
        else:
            values = {"group_size": weight.group_size, "bits": weight.bits}
            scheme = {"quantization": values}
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
