"""Folders: what is read and written beside the weights.

A folder that is saved names this package in `auto_map` and holds two files of a line each which
import it: `from_pretrained(..., trust_remote_code=True)` then works wherever elmkernels is
installed, by the same keys as Apple's own folders have. The tokenizer's files of the folder that
the model came from go along.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ...checks import fail
from ...openelm.compressed import STORED_FORMS, Compressed
from ...text import hub

AUTO_MAP = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}
_STUB = '''"""OpenELM on elmkernels' kernels: pip install 'elmkernels[hf]'."""

from elmkernels.integrations.huggingface import {name}  # noqa: F401
'''
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_HUB = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies",
)  # fmt: skip


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say where files come from."""
    return {name: options[name] for name in _HUB if options.get(name) is not None}


def only_here(
    path: Any, options: dict[str, Any], holds: Sequence[str] = (*hub.WEIGHTS, "adapter_config.json")
) -> None:
    """Have a repository's name mean what the hub's cache holds of it, so that loading a model
    downloads nothing; `local_files_only=False` and a revision or cache of one's own leave it to
    transformers.

    Args:
        path: a folder, or a repository's name.
        options: of from_pretrained; it becomes local_files_only.
        holds: files, of which the cache must have one.

    Raises:
        FileNotFoundError: the cache doesn't hold it, with the command that fetches it.
    """
    said = ("local_files_only", "revision", "cache_dir", "force_download", "subfolder", "gguf_file")
    if path is None or Path(path).exists() or any(options.get(n) is not None for n in said):
        return
    if hub.snapshot(str(path), holds) is None:
        hub.local_path(path)
    options["local_files_only"] = True


def compression_of(path: str, options: dict[str, Any]) -> str | None:
    """The word in config.json that says how a folder's matrices are compressed, None if they are
    plain.

    Args:
        path: a folder, or a repository's name.
        options: of from_pretrained.
    """
    config = options.get("config")
    if isinstance(config, PreTrainedConfig):
        values = vars(config)
    else:
        try:
            values, _ = PreTrainedConfig.get_config_dict(config or path, **hub_options(options))
        except OSError:  # a folder of adapters: transformers finds the model that they are for
            return None
    return next((word for word in STORED_FORMS if values.get(word) is not None), None)


def local_folder(path: str, options: dict[str, Any]) -> Path:
    """The folder on this machine: the path itself, or where the hub's client keeps it."""
    folder = Path(path) / (options.get("subfolder") or "")
    if folder.is_dir():
        return folder
    config = cached_file(path, "config.json", **hub_options(options))
    index = cached_file(
        path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False,
        **hub_options(options),
    )  # fmt: skip
    if index is None:
        cached_file(path, "model.safetensors", **hub_options(options))
    else:
        from transformers.utils.hub import get_checkpoint_shard_files

        get_checkpoint_shard_files(path, index, **hub_options(options))
    return Path(config).parent


def one_device(device_map: Any) -> torch.device | None:
    """The device that a device_map names, None for the default one.

    Args:
        device_map: as from_pretrained takes it.

    Raises:
        ValueError: it names several.
    """
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        places = set(device_map.values())
        if len(places) != 1:
            fail("device_map", "one device for compressed weights", sorted(map(str, places)))
        device_map = places.pop()
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device_map)


def stored_as(body: nn.Module) -> dict[str, Any]:
    """What config.json says of compressed weights: {its word: the scheme}, empty for none."""
    return {m.word: m.scheme() for m in body.modules() if isinstance(m, Compressed)}


def write_beside(folder: Path, source: str | None) -> None:
    """The files beside a saved model: those that import this package, and the tokenizer's.

    Args:
        folder: where the model was saved.
        source: where it came from; None for nowhere.
    """
    for reference in AUTO_MAP.values():
        module, _, name = reference.partition(".")
        (folder / f"{module}.py").write_text(_STUB.format(name=name), encoding="utf-8")
    if source and Path(source).is_dir() and not folder.samefile(source):
        for name in _TOKENIZER:
            if (Path(source) / name).is_file() and not (folder / name).exists():
                shutil.copyfile(Path(source) / name, folder / name)
