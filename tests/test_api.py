"""The public callables are described, and every example in their docstrings runs as it says."""

import doctest
import json
import sys
from pathlib import Path

import pytest
import torch

import elmkernels
from docs.generate import api
from elmkernels import openelm, testing
from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.training.data.tokenizers import save as save_tokenizer

CONFIG = OpenELMConfig(
    num_transformer_layers=2, model_dim=256, head_dim=64, num_gqa_groups=2, ffn_dim_divisor=64,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(1.0, 2.0), vocab_size=512,
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip
ENTRIES = [entry for _, found in api.entries() for entry in found]
ALL = [x for entry in ENTRIES for x in (entry, *entry.members)]

# What an example's model has gone through already.
BEFORE = {"elmkernels.restore": elmkernels.accelerate, "elmkernels.unpack": elmkernels.pack}


def named(entry: api.Entry) -> str:
    return entry.name


@pytest.mark.parametrize("entry", ALL, ids=named)
def test_what_is_taken_and_returned_is_described(entry):
    doc = entry.doc
    assert doc.prose
    if isinstance(entry.value, property):
        return
    described = doc.named("Args") | doc.named("Attributes")
    taken = {name for name, _ in api.taken(entry)} - {"*"}
    assert taken - described == set()
    assert doc.named("Args") <= taken
    assert bool(api.returns(entry)) == ("Returns" in doc.sections)


@pytest.mark.parametrize("entry", ENTRIES, ids=named)
def test_there_is_an_example(entry):
    assert ">>> " in entry.doc.sections.get("Example", "")


def test_all_that_is_exported_is_described():
    assert len(ENTRIES) >= 40
    values = {id(entry.value) for entry in ENTRIES}
    for module in (elmkernels, openelm, testing):
        for name in module.__all__:
            value = getattr(module, name)
            assert id(value) in values or not callable(value), name


def prepared(entry: api.Entry, folder: Path) -> dict:
    """What an example may take for granted: a small model in memory and in "OpenELM-270M", tokens,
    torch, and all that the callable's own module and `elmkernels.openelm` export.
    """
    model = OpenELM.from_config(CONFIG, seed=0, dtype=torch.bfloat16)
    if "OpenELM-270M" in entry.doc.sections["Example"]:
        model.save_pretrained(folder / "OpenELM-270M")
        config = folder / "OpenELM-270M" / "config.json"
        said = json.loads(config.read_text()) | save_tokenizer(config.parent)
        config.write_text(json.dumps(said))
    if before := BEFORE.get(entry.name):
        before(model)
    owner = entry.name.rpartition(".")[0]
    module = sys.modules.get(owner) or sys.modules[owner.rpartition(".")[0]]
    names = {name: getattr(openelm, name) for name in openelm.__all__}
    names |= {k: v for k, v in vars(module).items() if not k.startswith("_")}
    ids = torch.tensor([[1, 2, 3, 4]])
    return names | {
        "torch": torch, "elmkernels": elmkernels, "model": model, "tokens": torch.tensor([5]),
        "input_ids": ids, "config": CONFIG,
        "cache": openelm.KVCache(CONFIG, 1, 16, dtype=torch.bfloat16),
    }  # fmt: skip


@pytest.mark.parametrize("entry", [x for x in ALL if "Example" in x.doc.sections], ids=named)
def test_examples_run(entry, tmp_path, monkeypatch):
    if "gguf" in entry.name:
        pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    names = prepared(entry, tmp_path)
    text = entry.doc.sections["Example"]
    test = doctest.DocTestParser().get_doctest(text, names, entry.name, None, 0)
    assert test.examples
    said: list[str] = []
    runner = doctest.DocTestRunner(Silent(), verbose=False)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


class Silent(doctest.OutputChecker):
    """An example that says nothing of its output may give any; one that does must give it."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)
