"""Small recipes and corpora for the tests of training."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elmkernels.training.data.tokens import Part, Tokens
from elmkernels.training.recipe import Data, Recipe, Schedule

MODEL = dict(num_transformer_layers=2, model_dim=64, head_dim=16, rope_max_length=64)
EOS = 256


def recipe(vocab_size: int = 300, **data: Any) -> Recipe:
    """A model of 2 layers and these fields of its data."""
    settings = Data(**{"sequence_length": 16, **data})
    model = {**MODEL, "vocab_size": vocab_size}
    return Recipe(model=model, data=settings, schedule=Schedule(steps=10, warmup_steps=2))


def changed(given: Recipe, **data: Any) -> Recipe:
    return replace(given, data=replace(given.data, **data))


def tokens_of(ids: list[int], eos: int | None = EOS, vocab_size: int = 300) -> Tokens:
    """Tokens that lie in memory."""
    return Tokens([Part(Path("memory"), np.array(ids, "<u2"), None)], vocab_size, eos)


def documents(seed: int, count: int, longest: int) -> list[int]:
    """Ids of random documents, empty ones as well, each closed by EOS."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for length in rng.integers(0, longest + 1, count):
        ids += [*rng.integers(0, 256, length).tolist(), EOS]
    return ids


def as_bytes(*texts: str) -> list[int]:
    """The ids of texts by the byte tokenizer."""
    return [i for text in texts for i in [*text.encode(), EOS]]


def jsonl(path: Path, *rows: Any) -> Path:
    """Rows (strings are written as they are) as lines, compressed if the name says so."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    raw = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path
