"""from_pretrained and save_pretrained of the model."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ...acceleration.layout import blocks_of, wrapped_in
from ...acceleration.report import Report
from ...acceleration.swap import accelerate
from ...checks import fail, is_integer
from ...openelm import OpenELM
from ...openelm.compressed import STORED_FORMS
from ...surgery import is_accelerated
from . import folders
from .configuration import OpenELMConfig

AUTO = "auto"
_MOST = 8  # problems that one error names
# Our body's own name of an untied projection, and Apple's.
_OURS, _THEIRS = "transformer.classifier.", "lm_head."
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class LoadsAndSaves:
    """What an `OpenELMForCausalLM` does with folders, and how it gets its kernels."""

    _report: Report | None = None

    @property
    def report(self) -> Report | None:
        """What `accelerate` put in, and what projections are inside of now; None if it didn't."""
        if self._report is None or not is_accelerated(self.transformer):
            return None
        return replace(self._report, wrapped=wrapped_in(blocks_of(self.transformer)))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: a folder names the installed package (see `folders`), it holds no copy of it.

        Args:
            auto_class: transformers' class that found this one.
        """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, kernels: str | None = AUTO,
        **options: Any,
    ) -> Any:  # fmt: skip
        """A model with the weights of a folder or a repository, on this package's kernels.

        Plain, quantized and packed12 folders are read, those of Apple and those that either
        library has saved.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository that the hub's
                cache on this machine holds; `local_files_only=False` lets transformers fetch it.
            args: of the constructor.
            kernels: "auto" for the best of each device, a backend's name, which then never falls
                back, or None for plain PyTorch.
            options: of transformers' from_pretrained.

        Returns:
            The model; its `report` says which kernels it has and what had to be left.

        Raises:
            TypeError: kernels is something else.
            FileNotFoundError: there is no such checkpoint here.
            ValueError: weights are missing, unexpected or of another shape, all in one error; or
                no backend has the name.
            RuntimeError: the backend can't run here.

        Example:
            >>> model = OpenELMForCausalLM.from_pretrained("OpenELM-270M")
            >>> print(model.report)
        """
        if kernels is not None and not isinstance(kernels, str):
            fail("kernels", "'auto', a backend's name or None", type(kernels).__name__, TypeError)
        path = pretrained_model_name_or_path
        folders.only_here(path, options)
        told = options.pop("output_loading_info", False)
        if path is not None and folders.compression_of(str(path), options):
            model, info = cls._compressed(str(path), options), {}
        else:
            model, info = cls._plain(path, args, options)
        if kernels is not None:
            model._accelerate_loaded(kernels)
        return (model, info) if told else model

    @classmethod
    def _plain(cls, path: Any, args: tuple, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = options.pop("ignore_mismatched_sizes", False)
        names = {rf"^{re.escape(_THEIRS)}": _OURS} | (options.pop("key_mapping", None) or {})
        model, info = super().from_pretrained(
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, key_mapping=names,
            **options,
        )  # fmt: skip
        if not getattr(model, "_hf_peft_config_loaded", False) and not wanted:
            _check(info, path)
        places = set(map(str, getattr(model, "hf_device_map", {}).values()))
        if len(places) > 1 and places & {"cpu", "disk"}:
            # Offloaded weights are there while their own module is called, and a layer here reads
            # its children's.
            raise ValueError(f"device_map must offload nothing, got {', '.join(sorted(places))}")
        return model, info

    @classmethod
    def _compressed(cls, path: str, options: dict[str, Any]) -> Any:
        """A folder whose matrices only this package reads."""
        if options.get("quantization_config") is not None:
            fail("quantization_config", f"None for {path}, whose weights are compressed", "one")
        folder = folders.local_folder(path, options)
        dtype = options.get("dtype", options.get("torch_dtype"))
        device = folders.one_device(options.get("device_map"))
        config = options.get("config")
        if not isinstance(config, OpenELMConfig):
            config = cls.config_class.from_pretrained(path, **folders.hub_options(options))
        if implementation := options.get("attn_implementation"):
            config._attn_implementation = implementation
        body = OpenELM.from_pretrained(
            folder, dtype=None if dtype == AUTO else dtype, device=device or "cpu"
        )
        config.name_or_path, config.dtype = path, body.norm.weight.dtype
        model = cls(config, body).eval()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def _accelerate_loaded(self, kernels: str) -> None:
        try:
            self.accelerate(kernels)
        except ValueError as error:  # such as layers that another library has replaced
            if kernels != AUTO:
                raise
            warnings.warn(f"loaded without kernels: {error}", stacklevel=3)

    def accelerate(self, kernels: str = AUTO, **options: Any) -> Report:
        """Put this package's kernels into the model, as `elmkernels.accelerate` does.

        Args:
            kernels: "auto", or a backend's name.
            options: of `elmkernels.accelerate`.

        Returns:
            The report, which is also the model's `report`.

        Raises:
            TypeError, ValueError, RuntimeError: as `elmkernels.accelerate` does.

        Example:
            >>> print(model.accelerate())
        """
        backend = None if kernels == AUTO else kernels
        self._asked = kernels, options
        self._report = accelerate(self.transformer, backend=backend, **options)
        # By the names of these classes a wrapper finds what it must not split.
        self._no_split_modules = {type(layer).__name__ for layer in self.transformer.layers}
        return self._report

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write a folder that Apple's keys describe, which `trust_remote_code=True` also loads.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes what is not a weight.
            state_dict: other weights than the model's own.
            options: of transformers' save_pretrained.

        Raises:
            ValueError: it is a file.

        Example:
            >>> model.save_pretrained("mine")
        """
        folder = Path(save_directory)
        if folder.is_file():
            fail("save_directory", "a folder", f"the file {folder}")
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(folder, is_main_process, state_dict, **options)
            return
        scheme = folders.stored_as(self.transformer)
        for word in STORED_FORMS:
            vars(self.config).pop(word, None)
        vars(self.config).update(scheme)
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**known, **folders.AUTO_MAP}
        source = self.config.name_or_path
        if scheme:
            self._save_compressed(folder, state_dict, options)
        else:
            if self.transformer.classifier is not None:
                own = self.state_dict() if state_dict is None else state_dict
                state_dict = {name.replace(_OURS, _THEIRS): value for name, value in own.items()}
            super().save_pretrained(folder, is_main_process, state_dict, **options)
        if is_main_process:
            folders.write_beside(folder, source)

    def _save_compressed(self, folder: Path, state_dict: Any, options: dict[str, Any]) -> None:
        if state_dict is not None:
            fail("state_dict", "None for compressed weights", type(state_dict).__name__)
        others = sorted(options.keys() - {"max_shard_size", "safe_serialization"})
        if others:
            warnings.warn(f"not used for compressed weights: {', '.join(others)}", stacklevel=3)
        size = options.get("max_shard_size")
        self.transformer.save_pretrained(folder, None if size is None else _bytes(size))
        dtype = self.transformer.norm.weight.dtype
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        self.config.dtype = dtype


def _bytes(size: int | str) -> int:
    """5 or "5GB" as bytes."""
    if is_integer(size):
        return size
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", size.strip())
    if found is None or found[2].upper() not in _UNITS:
        fail("max_shard_size", "a number of bytes, as 5000000000 or '5GB'", repr(size))
    return int(found[1]) * _UNITS[found[2].upper()]


def _check(info: dict[str, Any], path: Any) -> None:
    """Raise ValueError if a checkpoint is not that of the model."""
    problems = [f"missing: {key}" for key in info["missing_keys"]]
    problems += [f"unexpected: {key}" for key in info["unexpected_keys"]]
    problems += [
        f"shape: {key} must be {list(expected)}, got {list(got)}"
        for key, got, expected in info["mismatched_keys"]
    ]
    problems += info["error_msgs"]
    if problems:
        first, more = sorted(problems)[:_MOST], len(problems) - _MOST
        rest = [f"and {more} more"] if more > 0 else []
        raise ValueError(f"{path} is no checkpoint of its config.json: {'; '.join(first + rest)}")
