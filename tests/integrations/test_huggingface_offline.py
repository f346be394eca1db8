"""What is here is asked for nowhere else: folders and the Hub's cache, with a network that counts
and refuses.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.transformers_models import APPLE

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
NAME = "apple/OpenELM-270M"
PREAMBLE = """
import json, socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(str(args[-1]))
    raise OSError("there is no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from elmkernels import hf
where = sys.argv[1]
"""
DOORS = {
    "our configuration": "hf.OpenELMConfig.from_pretrained(where)",
    "our model": "hf.OpenELMForCausalLM.from_pretrained(where)",
    "contrastive search": "hf.OpenELMForCausalLM.from_pretrained(where).generate("
    "torch.tensor([[5, 6]]), penalty_alpha=0.6, top_k=4, max_new_tokens=2)",
    "AutoConfig": "AutoConfig.from_pretrained(where)",
    "AutoModelForCausalLM": "AutoModelForCausalLM.from_pretrained(where)",
    "the stub": "AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True)",
    "AutoTokenizer": "AutoTokenizer.from_pretrained(where)",
    "GenerationConfig": "GenerationConfig.from_pretrained(where)",
}
# transformers itself asks whether a name's revision is still the newest, unless it is told not to.
ASKS = ("AutoConfig", "AutoModelForCausalLM", "the stub", "AutoTokenizer", "GenerationConfig")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the Hub that holds one repository."""
    repository = tmp_path_factory.mktemp("hub") / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(APPLE, snapshot, ignore=shutil.ignore_patterns("expected*"))
    (snapshot / "generation_config.json").write_text('{"eos_token_id": 2}')
    (snapshot / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    return repository.parent


def ask(where, doors, hub, **variables):
    """{door: how often the network was asked, or an error's text}."""
    code = PREAMBLE + "found = {}\n"
    for door in doors:
        code += f"asked.clear()\ntry:\n    {DOORS[door]}\n    found[{door!r}] = len(asked)\n"
        code += f"except Exception as error:\n    found[{door!r}] = [len(asked), str(error)]\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(found))", str(where)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_folders(hub):
    found = ask(next(hub.glob("*/snapshots/*")), DOORS, hub)
    assert found == dict.fromkeys(DOORS, 0)


def test_names_by_our_classes(hub):
    doors = [door for door in DOORS if door not in ASKS]
    assert ask(NAME, doors, hub) == dict.fromkeys(doors, 0)


def test_names_by_all_classes_offline(hub):
    assert ask(NAME, DOORS, hub, HF_HUB_OFFLINE="1") == dict.fromkeys(DOORS, 0)


def test_a_name_that_is_not_here(hub):
    doors = ["our configuration", "our model"]
    for asked, text in ask("apple/OpenELM-450M", doors, hub).values():
        assert asked == 0 and "comes by: hf download apple/OpenELM-450M" in text
