"""The kinds of files that training reads: checkpoints, recipes, tokens."""

import gzip
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.training import optim, recipe, state
from elmkernels.training.data.prepare import prepare
from elmkernels.training.data.sequences import Sequences
from elmkernels.training.data.tokens import Tokens, open_part
from elmkernels.training.parallel import World
from elmkernels.training.run import train

from .. import corpora
from ..runs import write_recipe
from . import mutate
from .cases import Files, Kind, command, damaged_entry, damaged_header, files_of, put

HERE = World(torch.device("cpu"))


class Payload:
    """What unpickling it would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (f"{self.path}-ran",)


class Checkpoint(Kind):
    """A run's checkpoint, whose digests fit what it says in half of the cases."""

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.recipe_file = write_recipe(scratch)
        self.recipe, _ = recipe.load(self.recipe_file)
        self.config = recipe.model_config(self.recipe)
        train(self.recipe, scratch / "good", HERE, steps=1)
        self.good = files_of(scratch / "good" / "checkpoints" / "step-00000001")
        self.data = scratch / "good" / "data"
        self.model = OpenELM(self.config, seed=0)
        self.optimizer = optim.build(self.model, self.recipe)
        part = "part-00000.safetensors"
        self.names = [state.FACTS, state.FACTS, part]

    def make(self, rng: random.Random) -> Callable[[], str]:
        files: Files = dict(self.good)
        name = rng.choice(self.names)
        how = rng.random()
        fits = rng.random() < 0.5
        if how < 0.6 and name == state.FACTS:
            files[name] = mutate.dumped(mutate.values(rng, json.loads(files[name])))
        elif how < 0.5:
            files[name] = damaged_header(rng, files[name])
        elif how < 0.9:
            files[name] = mutate.bytes_of(rng, files[name])
        elif how < 0.95:
            files = self._of_pickles(files)
        if fits:
            self._make_fit(rng, files)
        folder = self.case / "checkpoints" / "step-00000001"
        self.case.mkdir()
        folder.parent.mkdir()
        put(folder, files)
        if how >= 0.95:
            damaged_entry(rng, folder, name)
        if rng.random() < 0.03:
            self.data.is_dir() and shutil.copytree(self.data, self.case / "data")
            return lambda: command("train", str(self.recipe_file), "--out", str(self.case),
                                   "--steps", "2")  # fmt: skip
        return self._resume

    def _of_pickles(self, files: Files) -> Files:
        """An earlier version's form, with code in it."""
        code = pickle.dumps(Payload(self.canary))
        facts = json.loads(files[state.FACTS]) | {"form": 1}
        facts["files"] = {".metadata": len(code), "__0_0.distcp": len(code)}
        text = mutate.dumped(facts)
        return {state.FACTS: text, ".metadata": code, "__0_0.distcp": code}

    def _make_fit(self, rng: random.Random, files: Files) -> None:
        import hashlib

        try:
            facts = json.loads(files[state.FACTS])
            if rng.random() < 0.7:
                facts["files"] = {
                    name: [len(data), hashlib.sha256(data).hexdigest()]
                    for name, data in files.items()
                    if name != state.FACTS
                }
            facts["sha256"] = state._digest_of(facts)
            files[state.FACTS] = mutate.dumped(facts)
        except (ValueError, TypeError, AttributeError, KeyError):
            pass

    def _resume(self) -> str:
        chosen = state.choose(self.case)
        if chosen is None:
            return "none"
        path, facts = chosen
        state.check_config(path, facts, self.config)
        state.recipe_changes(facts, recipe.to_mapping(self.recipe))
        state.restore(path, facts, self.model, self.optimizer)
        state.set_random_states(facts["random"], torch.device("cpu"))
        state.average({path: facts}, self.config)
        return "resumed"


class RecipeText(Kind):
    """Recipes and CoreNet's files, as YAML."""

    name = "recipe"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        ready = [recipe.READY / f"{name}.yaml" for name in ("tiny", "OpenELM-270M")]
        self.good = [path.read_text() for path in ready]
        self.good.append("base: tiny\nseed: 3\nengine:\n  kernels: false\nloss:\n  z_loss: 1e-4\n")
        corenet = [
            "taskname: x",
            "common.mixed_precision: true",
            "common.mixed_precision_dtype: bfloat16",
            "common.accum_freq: 2",
            "dataset.category: language_modeling",
            "dataset.train_batch_size0: 4",
            "dataset.language_modeling.sequence_length: 128",
            "model.language_modeling.name: general_gpt",
            "model.language_modeling.general_gpt.model_name: OpenELM-270M",
            "model.language_modeling.general_gpt.vocab_size: 32128",
            "optim.name: adamw",
            "optim.weight_decay: 0.1",
            "scheduler.max_iterations: 100",
            "scheduler.cosine.max_lr: 0.001",
        ]
        self.good.append("\n".join(corenet) + "\n")
        self.good.append(
            "model:\n  language_modeling:\n    general_gpt:\n"
            "      model_name: OpenELM-270M\n      vocab_size: 32128\n      padding_index: 3\n"
        )

    def make(self, rng: random.Random) -> Callable[[], str]:
        text = mutate.yaml(rng, rng.choice(self.good), f"{self.canary}-ran")
        data = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.15:
            data = mutate.bytes_of(rng, data)
        put(self.case, {"recipe.yaml": data})
        path = self.case / "recipe.yaml"
        if rng.random() < 0.1:
            return lambda: str(bool(OpenELMConfig.from_corenet_yaml(path)))
        if rng.random() < 0.1:
            return lambda: command("train", str(path), "--out", str(self.case / "out"),
                                   "--set", "data.train=/nowhere")  # fmt: skip
        return lambda: f"loaded {len(recipe.load(path)[1]) >= 0}"


class TokenFile(Kind):
    """Token files and the JSON beside them; texts, which become tokens."""

    def make(self, rng: random.Random) -> Callable[[], str]:
        return self._texts(rng) if rng.random() < 0.3 else self._tokens(rng)

    def _texts(self, rng: random.Random) -> Callable[[], str]:
        rows = [{"text": "some words " * rng.randint(0, 9), "n": i} for i in range(5)]
        lines = [json.dumps(row).encode() for row in rows]
        if rng.random() < 0.5:
            lines[rng.randrange(5)] = mutate.dumped(mutate.values(rng, rng.choice(rows)))
        text = b"\n".join(lines) + b"\n"
        files = {
            "a.jsonl": text, "b.txt": b"plain words\n" * 20, "c.jsonl.gz": gzip.compress(text),
            "d.txt.gz": gzip.compress(b"more words\n" * 20),
        }  # fmt: skip
        name = rng.choice([*files])
        if rng.random() < 0.7:
            files[name] = mutate.bytes_of(rng, files[name])
        self.case.mkdir()
        put(self.case / "texts", files)
        if rng.random() < 0.1:
            damaged_entry(rng, self.case / "texts", name)
        data = corpora.recipe(train=(str(self.case / "texts"),))

        def read() -> str:
            tokens = prepare(data, self.case / "cache", "train")
            again = prepare(data, self.case / "cache", "train")
            if (tokens.read(0, len(tokens)) != again.read(0, len(again))).any():
                raise AssertionError("the cache holds other tokens")
            return "prepared"

        return read

    def _tokens(self, rng: random.Random) -> Callable[[], str]:
        wide = rng.random() < 0.3
        dtype = "uint32" if wide else "uint16"
        count = rng.choice((0, 1, 40, 400))
        ids = np.array([rng.randrange(50) for _ in range(count)], np.dtype(dtype))
        facts: Any = {
            "dtype": dtype, "vocab_size": 50, "eos": 7, "documents": 3, "tokens": count,
            "fingerprint": "0" * 64,
        }  # fmt: skip
        data, text = ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes(), mutate.dumped(facts)
        how = rng.random()
        if how < 0.35:
            text = mutate.dumped(mutate.values(rng, facts))
        elif how < 0.55:
            text = mutate.bytes_of(rng, text)
        elif how < 0.9:
            data = mutate.bytes_of(rng, data, most=2)
        put(self.case, {"a.bin": data, "a.json": text})
        if how >= 0.9:
            damaged_entry(rng, self.case, rng.choice(("a.bin", "a.json")))
        eos = rng.choice((7, 7, None))
        return lambda: self._read(eos)

    def _read(self, eos: int | None) -> str:
        part = open_part(self.case / "a.bin", 50, eos)
        tokens = Tokens([part], 50, eos)
        sequences = Sequences(tokens, 16, separate_documents=eos is not None)
        for first in (0, 3, 10**9):
            batch = sequences.batch(first, 2)
            if int(batch.input_ids.max()) >= 50:
                raise AssertionError("an id that is no token")
        return "read"
