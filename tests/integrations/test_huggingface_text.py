"""pipeline, chat templates, and names of the Hub through transformers' classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.harness_tasks import write_checkpoint

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from elmkernels import OpenELM, generate, hf
from elmkernels.openelm import Tokenizer
from elmkernels.text import hub

ROOT = Path(__file__).resolve().parents[2]
NAME = "apple/OpenELM-tiny"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "small")


def tokenizer(folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", padding_side="left",
    )  # fmt: skip


def test_a_pipeline_writes_what_generate_writes(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(checkpoint))
    texts = ["the cat", "a dog ran to"]
    found = pipe(texts, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    ours, own = OpenELM.from_pretrained(checkpoint), Tokenizer.from_pretrained(checkpoint)
    for text, (row,) in zip(texts, found, strict=True):
        (expected,) = generate(ours, [text], 6, tokenizer=own)
        assert row["generated_text"].strip() == expected.text.strip()


def test_a_pipeline_takes_a_conversation(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    words = tokenizer(checkpoint)
    assert words.chat_template is None
    words.chat_template = hf.CHAT_TEMPLATE
    pipe = pipeline("text-generation", model=model, tokenizer=words)
    asked = [{"role": "user", "content": "the cat"}]
    (found,) = pipe(asked, max_new_tokens=4, do_sample=False)
    assert [m["role"] for m in found["generated_text"]] == ["user", "assistant"]


@pytest.fixture
def cached(checkpoint, tmp_path):
    """A cache of the Hub that holds the checkpoint by a name."""
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    checkpoint.rename(repository / "snapshots" / ("0" * 40))
    return tmp_path / "hub"


SCRIPT = """
import json, sys, torch
import elmkernels.hf
from elmkernels import OpenELM
from transformers import AutoModelForCausalLM
ids = torch.tensor([[1, 5, 9]])
models = [AutoModelForCausalLM.from_pretrained(sys.argv[1]),
          elmkernels.hf.OpenELMForCausalLM.from_pretrained(sys.argv[1], kernels=None)]
with torch.no_grad():
    expected = OpenELM.from_pretrained(sys.argv[1])(ids)
    print(json.dumps([float((m(ids).logits - expected).abs().max()) for m in models]))
"""


def test_a_name_is_found_in_the_cache_by_every_door(cached):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, NAME], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_CACHE": str(cached), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1])) < 2e-5


def test_what_is_not_there_says_how_to_fetch_it(monkeypatch, tmp_path):
    """Nothing is asked of the network for it."""
    import socket

    def connected(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", connected)
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=f"hf download {NAME}"):
        hf.OpenELMForCausalLM.from_pretrained(NAME)
    assert not any(tmp_path.iterdir())
