"""Names of the Hub: found in its cache as its client lays it out, and nothing is downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import main, refusal
from helpers.golden import load_hf_tiny
from helpers.tokenizers import hugging_face
from helpers.transformers_models import APPLE

from elmkernels.openelm import OpenELM, Tokenizer
from elmkernels.openelm.checkpoint import read_config
from elmkernels.openelm.tokenizer import find_tokenizer
from elmkernels.text import hub

ROOT = Path(__file__).resolve().parents[2]
NAME = "apple/OpenELM-tiny-Instruct"


def put(cache: Path, name: str, source: Path, only: str = "*") -> Path:
    """A repository in a cache, as the client leaves it: files are links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = repository / "snapshots" / commit
    for place in (folder, repository / "refs", repository / "blobs"):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(commit)
    for i, file in enumerate(sorted(source.glob(only))):
        shutil.copyfile(file, repository / "blobs" / str(i))
        (folder / file.name).symlink_to(Path("../../blobs") / str(i))
    return folder


@pytest.fixture
def apple(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(APPLE, source, ignore=shutil.ignore_patterns("expected*"))
    hugging_face(source)
    return source


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that the code finds."""
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_name_is_found_in_the_cache(cache, apple):
    folder = put(cache, NAME, apple)
    assert hub.local_path(NAME) == folder
    golden = load_hf_tiny()
    with torch.no_grad():
        got = OpenELM.from_pretrained(NAME)(golden.tensors["input_ids"])
    assert (got - golden.tensors["logits"]).abs().max() < 2e-5
    assert read_config(NAME).vocab_size == got.shape[-1]
    assert Tokenizer.from_pretrained(NAME).path == folder / "tokenizer.json"
    assert find_tokenizer(NAME, None) == folder / "tokenizer.json"


def test_a_folder_that_is_here_goes_first(cache, apple, tmp_path):
    put(cache, NAME, apple)
    shutil.copytree(apple, tmp_path / NAME)
    assert hub.local_path(NAME) == Path(NAME)


def test_the_command_line_takes_names(cache, apple, capsys):
    put(cache, NAME, apple)
    argv = ["generate", "--checkpoint", NAME, "--ids", "1,5", "--max-new-tokens", "2", "--json"]
    assert main(argv) == 0
    assert '"model": "OpenELM-tiny-Instruct"' in capsys.readouterr().out


def test_a_tokenizer_alone_is_found(cache, apple):
    folder = put(cache, "meta-llama/Llama-2-7b-hf", apple, "tokenizer.json")
    assert find_tokenizer("meta-llama/Llama-2-7b-hf", None) == folder / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="hf download meta-llama/Llama-2-7b-hf"):
        OpenELM.from_pretrained("meta-llama/Llama-2-7b-hf")


@pytest.mark.parametrize("damage", ["nothing", "no refs", "odd refs", "no weights", "dangling"])
def test_what_is_not_there_says_how_to_fetch_it(cache, apple, damage):
    folder = put(cache, NAME, apple) if damage != "nothing" else None
    refs = cache / "models--apple--OpenELM-tiny-Instruct/refs/main"
    if damage == "no refs":
        refs.unlink()
    elif damage == "odd refs":
        refs.write_text("../../..")
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "dangling":
        shutil.rmtree(refs.parents[1] / "blobs")
    for load in (OpenELM.from_pretrained, Tokenizer.from_pretrained, read_config):
        with pytest.raises(
            FileNotFoundError, match=f"nor does the Hub's cache .*: hf download {NAME}"
        ):
            load(NAME)


@pytest.mark.parametrize("path", ["missing", "a/b/c", "../up", "/abs/path", "a/.."])
def test_other_paths_are_paths(cache, path):
    with pytest.raises(FileNotFoundError, match="does not exist") as raised:
        hub.local_path(path)
    assert "hf download" not in str(raised.value)


def test_the_command_line_says_how_to_fetch(cache, capsys):
    line = refusal(capsys, "generate", "--checkpoint", NAME, "--ids", "1")
    assert line.startswith(f"elmkernels: error: --checkpoint: {NAME} does not exist")
    assert f"hf download {NAME}" in line


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"HF_HUB_CACHE": "X/one"}, "X/one"),
        ({"HF_HOME": "X/home"}, "X/home/hub"),
        ({"XDG_CACHE_HOME": "X/cache"}, "X/cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "X/one", "HF_HOME": "X/home"}, "X/one"),
        ({}, "X/.cache/huggingface/hub"),
    ],
)  # fmt: skip
def test_where_the_cache_is(environment, expected, installed, tmp_path):
    """With the client and without it the same."""
    if installed:
        pytest.importorskip("huggingface_hub")
    hide = "" if installed else "import sys; sys.modules['huggingface_hub'] = None\n"
    script = f"{hide}from elmkernels.text.hub import cache_folder; print(cache_folder())"
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    given = {name: value.replace("X", str(tmp_path), 1) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
        env=clean | {"HOME": str(tmp_path)} | given,
    )  # fmt: skip
    assert done.stdout.strip() == expected.replace("X", str(tmp_path), 1), done.stderr
