"""The kinds of files that are fuzzed: each makes good ones once, a damaged set for a case, and
reads it as the package's users do.

A case ends in what it loaded, or in an error that the package documents: ValueError, OSError, and
for a recipe's fields TypeError. Whatever loads is used: its tokens are decoded by the kernels.
"""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from elmkernels import OpenELM, OpenELMConfig, accelerate, generate, pack, quantize
from elmkernels.cli.main import main

from . import mutate

SMALL = OpenELMConfig(
    num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2,
    qkv_multipliers=(1.0, 2.0), ffn_multipliers=(1.0, 2.0), ffn_dim_divisor=64,
    normalize_qk_projections=True, share_input_output_layers=True, vocab_size=50,
    rope_max_length=64, max_context_length=32,
)  # fmt: skip
Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def put(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def used(model: OpenELM) -> str:
    """Decode a few tokens with what was loaded; an op may refuse it (norms of two dtypes)."""
    try:
        accelerate(model)
        generate(model, [[1, 2, 3], [4]], 2)
    except (ValueError, TypeError) as error:
        if " must " not in str(error):
            raise
        return "loaded, not usable"
    return "loaded"


def damaged_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = mutate.values(rng, json.loads(data[8 : 8 + size]))
    text = mutate.dumped(header)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**40, len(text) + 9))
    return length.to_bytes(8, "little") + text + data[8 + size :]


def damaged_entry(rng: random.Random, folder: Path, name: str) -> None:
    """Something else under a file's name: a folder, a link, a pipe, nothing."""
    path = folder / name
    path.unlink(missing_ok=True)
    how = rng.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.symlink_to("/dev/zero")
    elif how == 3:
        os.mkfifo(path)
    elif how == 4:
        path.symlink_to(folder.parent / "canary")


@cache
def warm() -> None:
    """Have loaded what is loaded late."""
    for form in (None, pack, quantize):
        model = OpenELM(SMALL, seed=1, dtype=torch.bfloat16)
        if form is not None:
            form(model)
        used(model)


class Kind:
    """One kind. `canary`: a path outside of a case's folder that no reader may touch. `name`: of
    the kind of the case that was made last.
    """

    name = ""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.case = scratch, scratch / "case"
        self.canary = scratch / "canary"
        self.canary.write_text("precious")
        warm()

    def make(self, rng: random.Random) -> Callable[[], str]:
        """Write the case's files; gives what reads them, and says what it found."""
        raise NotImplementedError

    def clean(self) -> None:
        shutil.rmtree(self.case, ignore_errors=True)


class Folder(Kind):
    """A checkpoint's folder, of one file or shards; or one CoreNet file."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.good: list[Files] = []
        for untied, shard in ((False, None), (True, None), (False, 20_000)):
            config = SMALL.to_hf_dict() | {"share_input_output_layers": not untied}
            model = OpenELM(OpenELMConfig.from_hf_dict(config), seed=1, dtype=torch.float32)
            model.save_pretrained(scratch / "good", max_shard_bytes=shard)
            self.good.append(files_of(scratch / "good"))
            shutil.rmtree(scratch / "good")
        self.torch_files = []
        for zipped in (True, False):
            data = io.BytesIO()
            state = OpenELM(SMALL, seed=1).state_dict()
            torch.save(state, data, _use_new_zipfile_serialization=zipped)
            self.torch_files.append(data.getvalue())

    def make(self, rng: random.Random) -> Callable[[], str]:
        if rng.random() < 0.12:
            put(self.case, {"model.pt": mutate.bytes_of(rng, rng.choice(self.torch_files))})
            return lambda: used(OpenELM.from_pretrained(self.case / "model.pt", config=SMALL))
        files = dict(rng.choice(self.good))
        names = list(files)
        name = "config.json" if rng.random() < 0.4 else rng.choice(names)
        how = rng.random()
        if how < 0.08:
            put(self.case, files)
            damaged_entry(rng, self.case, name)
        else:
            if name.endswith(".json") and how < 0.8:
                files[name] = mutate.dumped(mutate.values(rng, json.loads(files[name])))
            elif name.endswith(".safetensors") and how < 0.6:
                files[name] = damaged_header(rng, files[name])
            elif how < 0.97:
                files[name] = mutate.bytes_of(rng, files[name])
            else:
                files[name] = files.pop(rng.choice(names), b"")
            put(self.case, files)
        if rng.random() < 0.05:
            return self._by_command
        dtype = rng.choice((None, None, torch.bfloat16, torch.float16))
        return lambda: used(OpenELM.from_pretrained(self.case, dtype=dtype))

    def _by_command(self) -> str:
        out = self.scratch / "case" / "out"
        return command("convert", "--checkpoint", str(self.case), "--to", "packed12",
                       "--dtype", "bf16", "--out", str(out))  # fmt: skip


def command(*argv: str) -> str:
    """A command line, whose errors must be one line and exit 2 (or 1 for a run that failed)."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(argv))
    lines = [line for line in errors.getvalue().splitlines() if "error: " in line]
    if code and (code not in (1, 2) or len(lines) != 1):
        raise AssertionError(f"exit {code} with {errors.getvalue()[-300:]!r}")
    return f"command, exit {code}"


class SaveJournal(Kind):
    """A folder with the journal of a save that was interrupted, or of one that never was."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        model = OpenELM(SMALL, seed=1)
        model.save_pretrained(scratch / "good")
        self.good = files_of(scratch / "good")
        shutil.rmtree(scratch / "good")
        self.model = OpenELM(SMALL, seed=2)

    def make(self, rng: random.Random) -> Callable[[], str]:
        token = rng.choice(("0123abcd", "89abcdef"))
        temporary = {name: f".{name}.{token}.elmkernels-tmp" for name in self.good}
        files = dict(self.good)
        for name in rng.sample(list(temporary), rng.randint(0, len(temporary))):
            files[temporary[name]] = files.pop(name) if rng.random() < 0.5 else files[name]
        places = (
            str(self.canary), "../canary", "canary", "..", ".", "", "config.json", "/etc/hostname",
            ".config.json.0123abcd.elmkernels-tmp", "model-00001-of-00002.safetensors", "\x00",
            "model.safetensors", "tokenizer.json", "..\\canary", "c:canary", "./config.json",
        )  # fmt: skip
        journal: Any = {
            "rename": {t: name for name, t in temporary.items()},
            "remove": rng.choice(([], [], ["model-00001-of-00002.safetensors"])),
        }
        for _ in range(rng.randint(0, 3)):
            which = rng.randrange(4)
            if which == 0:
                journal["rename"][rng.choice(places)] = rng.choice(places)
            elif which == 1:
                at = rng.choice(places)
                journal["rename"][f".{at}.{token}.elmkernels-tmp"] = at
            elif which == 2:
                journal["remove"].append(rng.choice(places))
        if rng.random() < 0.4:
            journal = mutate.values(rng, journal)
        text = mutate.dumped(journal)
        if rng.random() < 0.2:
            text = mutate.bytes_of(rng, text)
        put(self.case, files | {".elmkernels-save.json": text, "tokenizer.json": b"{}"})
        if rng.random() < 0.05:
            damaged_entry(rng, self.case, ".elmkernels-save.json")
        return self._load_and_save

    def _load_and_save(self) -> str:
        try:
            OpenELM.from_pretrained(self.case)
        except (ValueError, OSError):
            with contextlib.suppress(ValueError, OSError):
                self.model.save_pretrained(self.case)
            raise
        finally:
            if (self.case / "tokenizer.json").read_bytes() != b"{}":
                raise AssertionError("a file that is no checkpoint's has changed")
        self.model.save_pretrained(self.case)
        return used(OpenELM.from_pretrained(self.case))


class Packed(Kind):
    """Matrices in packed12 and in 8 and 4 bits, whose tensors contradict each other."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.good = []
        for form in (pack, lambda m, **k: quantize(m, 8, 32, **k), lambda m: quantize(m, 4, 64)):
            model = OpenELM(SMALL, seed=1, dtype=torch.bfloat16)
            with torch.no_grad():  # escapes, many in a row
                for i in range(3):
                    model.layers[i % 2].ffn.proj_1.weight[i, :40] = 2.0 ** -torch.arange(30, 70)
            form(model)
            model.save_pretrained(scratch / "good")
            tensors = load_file(scratch / "good" / "model.safetensors")
            self.good.append((files_of(scratch / "good"), tensors, model))
            shutil.rmtree(scratch / "good")

    def make(self, rng: random.Random) -> Callable[[], str]:
        files, tensors, model = rng.choice(self.good)
        tensors = dict(tensors)
        for _ in range(rng.randint(1, 3)):
            names = [n for n in tensors if "escape" in n or rng.random() < 0.3] or list(tensors)
            name = rng.choice(names)
            tensors[name] = damaged_tensor(rng, tensors[name])
        if rng.random() < 0.3:
            return self._by_state(rng, model, tensors)
        put(self.case, files | {"model.safetensors": save(tensors)})
        dtype = rng.choice((None, None, torch.float16))
        return lambda: used(OpenELM.from_pretrained(self.case, dtype=dtype))

    def _by_state(self, rng: random.Random, model: OpenELM, tensors: dict) -> Callable[[], str]:
        """load_state_dict, strict or not, assigned or copied, of all or some of the tensors."""
        import copy

        strict, assign = rng.random() < 0.5, rng.random() < 0.5
        if rng.random() < 0.3:
            tensors = {name: t for name, t in tensors.items() if rng.random() < 0.7}
        state = {name.removeprefix("transformer."): t for name, t in tensors.items()}

        def load() -> str:
            other = copy.deepcopy(model)
            try:
                other.load_state_dict(state, strict=strict, assign=assign)
            except RuntimeError as error:
                if not str(error).startswith("Error(s) in loading state_dict"):
                    raise
                other = copy.deepcopy(other)  # what it holds now must be usable all the same
                return f"state refused, then {used(other)}"
            return f"state {used(other)}"

        return load


def damaged_tensor(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Other numbers, another order, another shape or another dtype."""
    how = rng.randrange(10)
    flat = x.clone().flatten()
    if not flat.numel():
        return flat.new_zeros(rng.choice((1, 5)))
    at = rng.randrange(flat.numel())
    if how <= 3:
        signed = flat.view(torch.int32) if flat.dtype == torch.uint32 else flat
        if x.is_floating_point():
            signed[at] = rng.choice((float("inf"), float("nan"), -float("inf"), 1e38, 0.0))
        elif flat.dtype == torch.uint8:
            signed[at] = rng.randrange(256)
        else:
            near = int(signed[at]) + rng.choice((-1, 1))
            signed[at] = rng.choice((-1, 0, 1, 63, 64, 128, 2**31 - 1, -(2**31), near))
        return flat.view(x.shape)
    if how == 4 and flat.dtype != torch.uint32:
        return flat.flip(0).view(x.shape)
    if how == 5 and flat.dtype != torch.uint32:
        end = min(flat.numel(), at + rng.randint(2, 9))
        flat[at:end] = flat[at:end].flip(0)
        return flat.view(x.shape)
    if how == 6:
        return flat[:at].clone()
    if how == 7 and x.dim() > 1:
        return x.flatten(0, 1).clone()
    if how == 8:
        other = rng.choice((torch.int64, torch.float32, torch.uint8, torch.bfloat16, torch.int32))
        return (
            (flat.view(torch.int32) if flat.dtype == torch.uint32 else flat).to(other).view(x.shape)
        )
    changed = mutate.bytes_of(rng, flat.view(torch.uint8).numpy().tobytes())[: flat.nbytes]
    changed += bytes(flat.nbytes - len(changed))
    return torch.frombuffer(bytearray(changed), dtype=torch.uint8).view(x.dtype).view(x.shape)
