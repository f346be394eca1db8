"""Small runs: a corpus, a recipe for it, and the command, in this process or under torchrun."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from elmkernels.cli.main import main
from elmkernels.training.journal import curve, events

from . import ROOT

MODEL = {
    "num_transformer_layers": 2,
    "model_dim": 32,
    "head_dim": 16,
    "num_gqa_groups": 2,
    "qkv_multipliers": [1.0, 2.0],
    "ffn_multipliers": [1.0, 2.0],
    "ffn_dim_divisor": 16,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "rope_max_length": 128,
    "max_context_length": 64,
    "vocab_size": 257,
}
WORDS = "the of and a to in is model layer norm head def return import class".split()


def write_recipe(folder: Path, steps: int = 8, **sections: Any) -> Path:
    """A corpus of short documents in a folder, and a recipe's file that trains on it in fp32."""
    chance = random.Random(0)
    for split, count in (("train", 120), ("held", 20)):
        (folder / split).mkdir(exist_ok=True)
        for i in range(count):
            text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 60)))
            (folder / split / f"{i:03d}.txt").write_text(text)
    recipe = {
        "model": MODEL,
        "data": {
            "train": [str(folder / "train")],
            "validation": [str(folder / "held")],
            "sequence_length": 64,
        },
        "batch": {"sequences": 8, "micro": 2},
        "schedule": {"steps": steps, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4},
        "engine": {"precision": "fp32"},
        "keep": {
            "checkpoint_every": 4,
            "checkpoints": 3,
            "average": 2,
            "log_every": 1,
            "evaluate_every": 4,
            "evaluate_sequences": 5,
        },
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def train(recipe: Path, out: Path, *options: str, code: int = 0) -> dict[int, float]:
    """Run the command here; gives the curve of the losses."""
    torch.manual_seed(0)
    assert main(["train", str(recipe), "--out", str(out), *options]) == code
    return losses(out) if code == 0 else {}


def launch(recipe: Path, out: Path, *options: str, script: tuple[str, ...] = ()) -> list[str]:
    """torchrun's command line for two processes; script: instead of the package's own command."""
    target = script or ("-m", "elmkernels")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    # A free port of its own, so that runs beside this one don't meet.
    run += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0"]
    return [*run, *target, "train", str(recipe), "--out", str(out), *options]


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(command: list[str], code: int = 0) -> subprocess.CompletedProcess:
    """Run to the end, within a minute or two."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    return done


def losses(out: Path) -> dict[int, float]:
    return curve(out / "train.jsonl")


def steps_of(out: Path, event: str) -> list[int]:
    return [e["step"] for e in events(out / "train.jsonl") if e["event"] == event]


def weights(out: Path, which: str = "final") -> dict[str, torch.Tensor]:
    return load_file(out / which / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
