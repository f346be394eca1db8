"""Every example runs at its smallest, as a user starts it, and says what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each one prints, and only if what it shows has worked.
SAYS = {
    "accelerate_and_verify": "greedy tokens equal in every row",
    "compare_kernels": "reference ",
    "evaluate": "the first alone: equal: True",
    "generate_with_transformers": "32 of 32 tokens equal",
    "generate_text": "accelerated (elmkernels model): 2 layers",
    "one_op": "documents stay apart: True",
    "quantize_and_compare": "packed12 logits move by 0.00%, the likeliest token stays for 100%",
    "speculative_decoding": "tokens equal",
    "train_tiny": "step 4: loss",
}

# What is trained by what is not installed everywhere: with the reader's own folder and data.
RECIPES = {
    "dpo_instruct": {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    "lora_commonsense": {"instruction": "Who sat?", "input": "", "output": "the cat"},
}


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=600,
    )


def test_every_example_has_a_line_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*SAYS, *RECIPES}


@pytest.mark.parametrize("name", SAYS)
def test_example(name, tmp_path):
    if name == "generate_text":
        pytest.importorskip("tokenizers")
    if name == "generate_with_transformers":
        pytest.importorskip("transformers")
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert SAYS[name] in done.stdout.decode("utf-8", "replace")
    assert b"other tokens" not in done.stdout
    assert not any(tmp_path.iterdir())  # nothing is left behind


def test_an_example_takes_a_checkpoint(folder, tmp_path):
    """A folder of the reader's own, with what the model says verified on it."""
    done = run("accelerate_and_verify", tmp_path, "--checkpoint", str(folder), "--tokens", "8")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"ok ") > 10


@pytest.mark.ecosystem
@pytest.mark.parametrize(("name", "options"), [
    ("dpo_instruct", []), ("dpo_instruct", ["--model", "1_1B"]), ("lora_commonsense", []),
    ("lora_commonsense", ["--dora"]),
])  # fmt: skip
def test_a_recipe_trains(name, options, tmp_path):
    from helpers.tokenizers import hugging_face
    from helpers.transformers_models import body

    for needed in ("transformers", "peft", "datasets", "trl"):
        pytest.importorskip(needed)
    source, out, data = (tmp_path / n for n in ("source", "out", "data.json"))
    body().save_pretrained(source)
    hugging_face(source)
    names = '{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}'
    (source / "tokenizer_config.json").write_text(names)
    data.write_text("\n".join([json.dumps(RECIPES[name])] * 16))
    options = ["--checkpoint", source, "--data", data, "--out", out, "--steps", "2", *options]
    done = run(name, tmp_path, *map(str, options))
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode()
    assert "accelerated (elmkernels model): 3 layers" in said
    assert ("12 projections inside of peft's" in said) == (name == "lora_commonsense")
    saved = "adapter_model.safetensors" if name == "lora_commonsense" else "model.safetensors"
    assert (out / saved).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_stay_short(path):
    assert 20 <= len(path.read_text().splitlines()) <= 60
