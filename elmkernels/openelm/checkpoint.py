"""Checkpoints: Hugging Face folders, read and written, and CoreNet's .pt files, read.

The folder holds config.json and either model.safetensors or shards with an index; its keys are
CoreNet's with a `transformer.` prefix, the untied classifier is `lm_head.weight`. A CoreNet file
is a state dict, bare or (a training checkpoint) under `model_state_dict`.

Loading checks every key and shape before it reads a weight, and reports all that is wrong at
once. Weights are mapped from the file, not copied, where neither dtype nor device changes; the
mapping is private, so training on them leaves the file alone.

Saving writes every file under a temporary name first, then a journal of the renames, then renames.
The journal's own rename is the moment the new checkpoint exists: before it the folder is the old
one, after it `load` finds the new files under either name, so that killing the process at any
point never mixes two checkpoints.
"""

import json
import os
import pickle
import re
import secrets
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import VARIANTS, OpenELMConfig
from .model import OpenELM

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_JOURNAL = ".elmkernels-save.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.elmkernels-tmp")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Stored(NamedTuple):
    """One tensor of a file, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def load(
    path: str | Path,
    *,
    config: OpenELMConfig | Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> OpenELM:
    """The model of a Hugging Face folder, or of one CoreNet (.pt) or safetensors file with its
    `config`: an OpenELMConfig, a CoreNet YAML (parsed or its path) or a variant's name. Weights
    keep their stored dtype unless `dtype` is given.
    """
    path = Path(path)
    if dtype is not None and dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {list(_DTYPE_NAMES)}, got {dtype}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (a local folder or file; no download)")
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config must not be given with a folder: {path / _CONFIG} is read")
        folder = _Folder(path)
        config, stored = _folder_config(folder), _folder_weights(folder)
    else:
        config = _given_config(config, path)
        single = _safetensors if path.suffix == ".safetensors" else _torch_file
        stored = single(path)
    chosen = _match(config, stored, path)
    device = torch.get_default_device() if device is None else torch.device(device)
    weights = {}
    for name in _progress(chosen, f"loading {path.name}"):
        weight = chosen[name].read()
        weights[name] = weight.to(device=device, dtype=dtype or weight.dtype).contiguous()
    model = OpenELM(config, device="meta")
    model.load_state_dict(weights, assign=True)
    return model


def save(model: OpenELM, path: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Write a Hugging Face folder, in place of a checkpoint that is already there. A file over
    max_shard_bytes is split between tensors.
    """
    folder = Path(path)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, {folder} is a file")
    weights = _weights_to_save(model)
    shards = _split(weights, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [_WEIGHTS]
    texts = {_CONFIG: model.config.to_hf_dict()}
    texts[_CONFIG]["torch_dtype"] = str(model.token_embeddings.weight.dtype).split(".")[-1]
    if count > 1:
        weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(weight.nbytes for weight in weights.values())
        texts[_INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    folder.mkdir(parents=True, exist_ok=True)
    _finish_renames(folder)
    token = secrets.token_hex(4)
    final_names = (*names, *texts)
    temporary = {name: f".{name}.{token}.elmkernels-tmp" for name in final_names}
    stale = [
        entry.name
        for entry in folder.iterdir()
        if (entry.name in (_WEIGHTS, _INDEX) or _SHARD.fullmatch(entry.name))
        and entry.name not in final_names
    ]
    try:
        for name, shard in zip(_progress(names, f"saving {folder.name}"), shards, strict=True):
            _write_safetensors(folder / temporary[name], shard)
        for name, values in texts.items():
            _write_json(folder / temporary[name], values)
        _sync_folder(folder)
        journal = folder / f".journal.{token}.elmkernels-tmp"
        _write_json(
            journal, {"rename": {t: name for name, t in temporary.items()}, "remove": stale}
        )
        os.replace(journal, folder / _JOURNAL)
    except BaseException:
        _remove_temporaries(folder, only=token)
        raise
    _sync_folder(folder)
    _finish_renames(folder)
    _remove_temporaries(folder)


class _Folder:
    """A checkpoint folder as its last completed save left it, whatever its files are called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        journal = _read_journal(path)
        self._renames = {name: temporary for temporary, name in journal["rename"].items()}
        self._removed = set(journal["remove"])

    def find(self, name: str) -> Path | None:
        renamed = self.path / self._renames.get(name, name)
        for candidate in (renamed, self.path / name):
            if candidate.is_file() and name not in self._removed:
                return candidate
        return None


def raw_config(path: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as it stands there. Raises FileNotFoundError or
    ValueError.
    """
    file = _Folder(Path(path)).find(_CONFIG)
    if file is None:
        raise FileNotFoundError(f"{Path(path) / _CONFIG} does not exist")
    return _read_json(file)


def _folder_config(folder: _Folder) -> OpenELMConfig:
    values = raw_config(folder.path)
    try:
        return OpenELMConfig.from_hf_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.path / _CONFIG}: {error}") from error


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


def _folder_weights(folder: _Folder) -> list[_Stored]:
    single = folder.find(_WEIGHTS)
    if single is not None:
        return _safetensors(single)
    index = folder.find(_INDEX)
    if index is None:
        raise FileNotFoundError(f"{folder.path} holds neither {_WEIGHTS} nor {_INDEX}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must map keys to file names of its folder")
    files = {name: folder.find(name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, not found beside it")
    return [
        stored
        for name, file in files.items()
        for stored in _safetensors(file)
        if weight_map.get(stored.key, name) == name
    ]


def _safetensors(file: Path) -> list[_Stored]:
    try:
        handle = safe_open(file, framework="pt")
        slices = {key: handle.get_slice(key) for key in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    return [
        _Stored(file, key, tuple(s.get_shape()), s.get_dtype(), partial(handle.get_tensor, key))
        for key, s in slices.items()
    ]


def _torch_file(file: Path) -> list[_Stored]:
    try:
        # Only torch.save's zip format, the default since torch 1.6, can be mapped.
        mapped = zipfile.is_zipfile(file)
        values = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(f"{file} is not a complete torch.save file: {error}") from error
    if isinstance(values, Mapping) and isinstance(values.get("model_state_dict"), Mapping):
        values = values["model_state_dict"]
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must hold a state dict, got {type(values).__name__}")
    stored = []
    for key, value in values.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        dtype = getattr(value, "dtype", type(value).__name__)
        dtype = _DTYPE_NAMES.get(dtype, str(dtype))
        stored.append(_Stored(file, str(key), shape, dtype, lambda value=value: value))
    return stored


def _match(config: OpenELMConfig, stored: Sequence[_Stored], path: Path) -> dict[str, _Stored]:
    """The stored tensor of every parameter, or one error with all that doesn't fit."""
    expected = config.parameter_shapes()
    prefix = "transformer." if any(s.key.startswith("transformer.") for s in stored) else ""
    chosen: dict[str, _Stored] = {}
    problems = []
    for s in stored:
        name = s.key.removeprefix("transformer.")
        name = "classifier.weight" if name == "lm_head.weight" else name
        if name not in expected or name in chosen:
            problems.append(f"unexpected: {s.key} {list(s.shape)} in {s.file.name}")
            continue
        chosen[name] = s
        if s.shape != expected[name]:
            problems.append(
                f"shape: {s.key} must be {list(expected[name])}, got {list(s.shape)} "
                f"in {s.file.name}"
            )
        elif s.dtype not in _DTYPES:
            problems.append(f"dtype: {s.key} must be floating point, got {s.dtype}")
    for name in expected.keys() - chosen.keys():
        key = "lm_head.weight" if prefix and name == "classifier.weight" else prefix + name
        problems.append(f"missing: {key} {list(expected[name])}")
    if problems:
        raise ValueError(
            "\n  ".join((f"{path} does not fit its configuration:", *sorted(problems)))
        )
    return {name: chosen[name] for name in expected}


def _weights_to_save(model: OpenELM) -> dict[str, Tensor]:
    """Name in the file -> weight."""
    state, expected = model.state_dict(), model.config.parameter_shapes()
    different = sorted(state.keys() ^ expected.keys()) + [
        name for name, shape in expected.items() if name in state and state[name].shape != shape
    ]
    if different:
        raise ValueError(
            f"the model's state_dict is not its configuration's: {', '.join(different)}"
        )
    for name, weight in state.items():
        if weight.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name} must be floating point, got {weight.dtype}")
    return {
        "lm_head.weight" if name == "classifier.weight" else f"transformer.{name}": state[name]
        for name in expected
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


def _write_safetensors(file: Path, weights: Mapping[str, Tensor]) -> None:
    """One tensor at a time: the library's own writer holds a copy of all of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The format wants no gaps, so wider dtypes first: every tensor is then aligned to its dtype.
    order = sorted(weights, key=lambda key: -weights[key].element_size())
    for key in order:
        weight, start = weights[key], end
        end += weight.nbytes
        header[key] = {
            "dtype": _DTYPE_NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            weight = weights[key].detach().to("cpu").contiguous()
            out.write(weight.reshape(-1).view(torch.uint8).numpy())
        _sync_file(out)


def _write_json(file: Path, values: Any) -> None:
    with open(file, "w", encoding="utf-8") as out:
        out.write(json.dumps(values, indent=2) + "\n")
        _sync_file(out)


def _sync_file(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder can't be opened, nor need its entries be synced
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def _read_journal(folder: Path) -> dict[str, Any]:
    file = folder / _JOURNAL
    return _read_json(file) if file.is_file() else {"rename": {}, "remove": []}


def _finish_renames(folder: Path) -> None:
    """Carry out what the journal says is left of a save; a second time does no harm."""
    journal = _read_journal(folder)
    for temporary, name in journal["rename"].items():
        if (folder / temporary).is_file():
            os.replace(folder / temporary, folder / name)
    for name in journal["remove"]:
        (folder / name).unlink(missing_ok=True)
    _sync_folder(folder)
    (folder / _JOURNAL).unlink(missing_ok=True)


def _remove_temporaries(folder: Path, only: str = "") -> None:
    for entry in folder.iterdir():
        if _TEMPORARY.fullmatch(entry.name) and only in entry.name:
            entry.unlink(missing_ok=True)


def _progress(items: Iterable[str], what: str) -> Iterator[str]:
    """The items, counted on a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items, 1):
            print(f"\r{what}: {i}/{len(items)}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
    else:
        yield from tqdm(items, desc=what, leave=False)
