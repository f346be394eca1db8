"""What a checkpoint says besides its shape and weights survives loading, saving, converting,
training and GGUF, word for word."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import GROUPED
from helpers.tokenizers import hugging_face, sentence_piece

from elmkernels import OpenELM, pack, quantize, unpack
from elmkernels.cli.main import main
from elmkernels.openelm.gguf import export_gguf
from elmkernels.openelm.tokenizer import Tokenizer
from elmkernels.text import metadata
from elmkernels.text.metadata import Metadata

SAID = {
    "eos_token_id": [77, 9],
    "bos_token_id": None,
    "pad_token_id": 0,
    "auto_map": {"AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
    "transformers_version": "4.39.3",
    "of_somebody": {"nested": [1, None, "\u00e9"]},
}
BESIDE = {
    "generation_config.json": b'{"eos_token_id":  [77, 9], "top_p": 0.9}',
    "tokenizer.json": b'{ "not": "read" }',
    "tokenizer_config.json": b'{"added_tokens_decoder": {}}',
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "tokenizer.model": bytes(range(256)),
    "vocab.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_openelm.py": b"raise SystemExit",
    "configuration_openelm.py": b"# code\n",
}


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder that says more than its shape."""
    folder = tmp_path / "source"
    OpenELM(GROUPED, seed=1, dtype=torch.bfloat16).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SAID))
    for name, data in BESIDE.items():
        (folder / name).write_bytes(data)
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_said(folder: Path, source: Path, *, but: tuple[str, ...] = ()) -> None:
    values, theirs = config_of(folder), config_of(source)
    assert {k: v for k, v in values.items() if k not in but} == {
        k: v for k, v in theirs.items() if k not in but
    }
    for name, data in BESIDE.items():
        assert (folder / name).read_bytes() == data, name


def test_a_save_says_what_was_loaded(source, tmp_path):
    model = OpenELM.from_pretrained(source)
    shutil.copytree(source, tmp_path / "kept")
    shutil.rmtree(source)  # nothing of it is needed any more
    for target, shards in ((tmp_path / "one", None), (tmp_path / "shards", 60_000), (source, None)):
        model.save_pretrained(target, max_shard_bytes=shards)
        assert_said(target, tmp_path / "kept")
    OpenELM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert_said(tmp_path / "two", tmp_path / "kept")


@pytest.mark.parametrize("form", ["quantized", "packed12"])
def test_a_conversion_and_its_way_back(source, tmp_path, form, capsys):
    how = ["--bits", "8", "--group-size", "32"] if form == "quantized" else []
    argv = ["convert", "--checkpoint", str(source), "--to", form, "--out", str(tmp_path / "c")]
    assert main([*argv, *how]) == 0
    assert_said(tmp_path / "c", source, but=("quantization", "elmkernels"))
    if form == "packed12":
        model = OpenELM.from_pretrained(tmp_path / "c")
        unpack(model)
        model.save_pretrained(tmp_path / "back")
        assert_said(tmp_path / "back", source)


def test_the_form_of_weights_is_said_anew(source, tmp_path):
    values = config_of(source) | {"quantization_config": {"bits": 3}, "dtype": "float16"}
    (source / "config.json").write_text(json.dumps(values))
    model = OpenELM.from_pretrained(source)
    quantize(model, 8, 32)
    model.save_pretrained(tmp_path / "q")
    found = config_of(tmp_path / "q")
    assert found["quantization"] == {"bits": 8, "group_size": 32}
    assert found.keys() & {"quantization_config", "dtype"} == set()
    assert found["torch_dtype"] == "bfloat16"


def test_a_damaged_file_beside_is_named(source):
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        OpenELM.from_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match="eos_token_id must be a token id"):
        OpenELM.from_pretrained(source)


def test_what_stands_beside_may_not_be_larger_than_any_tokenizer(source, monkeypatch):
    monkeypatch.setattr(metadata, "_LARGEST", 300)
    with pytest.raises(ValueError, match="must be at most 300 bytes together, got"):
        OpenELM.from_pretrained(source)


def test_training_takes_its_own_tokens_where_they_are_others():
    said = Metadata(SAID, BESIDE)
    same = said.with_ids({"bos_token_id": None, "eos_token_id": 9})
    assert (same.values, same.files) == (said.values, said.files)
    other = said.with_ids({"bos_token_id": 4, "eos_token_id": 5})
    assert (other.values["bos_token_id"], other.values["eos_token_id"]) == (4, 5)
    assert other.generation == {"eos_token_id": 5, "top_p": 0.9}
    assert Metadata().with_ids({"eos_token_id": 2}).values == {"eos_token_id": 2}


def added(folder: Path, first: int, how: str) -> dict[int, str]:
    """Tokens that a file adds beside a tokenizer.model, in one of the ways there are."""
    tokens = {first: "<|im_start|>", first + 1: "<|im_end|>", first + 2: "<tool \u00e9>"}
    if how == "added_tokens.json":
        (folder / how).write_text(json.dumps({text: i for i, text in tokens.items()}))
        (folder / "special_tokens_map.json").write_text(
            json.dumps({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        )
        return tokens
    entries = [{"id": i, "content": text, "special": "im_" in text} for i, text in tokens.items()]
    if how == "tokenizer.json":
        (folder / how).write_text(json.dumps({"added_tokens": entries}))
    else:
        decoder = {str(entry["id"]): entry for entry in entries}
        values = {"added_tokens_decoder": decoder, "chat_template": "{{ x }}"}
        (folder / how).write_text(json.dumps(values))
    return tokens


@pytest.mark.parametrize("elsewhere", [False, True], ids=["beside", "tokenizer elsewhere"])
@pytest.mark.parametrize("how", ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
def test_added_tokens_and_ends_reach_gguf(tmp_path, how, elsewhere):
    gguf = pytest.importorskip("gguf")
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "model"
    folder.mkdir()
    file = sentence_piece(tmp_path if elsewhere else folder)
    count = sentencepiece.SentencePieceProcessor(str(file)).vocab_size()
    config = type(GROUPED).from_hf_dict(
        GROUPED.to_hf_dict()
        | {"vocab_size": count + 4, "eos_token_id": [count + 1, 2], "pad_token_id": 0}
    )
    OpenELM(config, seed=1).save_pretrained(folder)
    tokens = added(folder, count, how)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    export_gguf(OpenELM.from_pretrained(folder), tmp_path / "m.gguf", "f16", tokenizer=file)
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert texts[count:] == [*tokens.values(), f"[PAD{count + 3}]"]
    control, own = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    assert kinds[count:] == [control, control, own, gguf.TokenType.UNUSED]
    assert kinds[:3] == [gguf.TokenType.UNKNOWN, control, control]
    said = {
        "tokenizer.ggml.eos_token_id": count + 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {name: fields[name] for name in said} == said
    found = json.loads(fields["elmkernels.config"])
    assert found == {k: v for k, v in config_of(folder).items() if k != "torch_dtype"}
    assert json.loads(fields["elmkernels.generation_config"]) == {"eos_token_id": 2}
    if how == "tokenizer.json":
        assert fields["tokenizer.huggingface.json"] == (folder / how).read_text()
    if how == "tokenizer_config.json":
        assert fields["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.parametrize("entry", [{"x": "y"}, {"x": 1.5}, {"x": -1}, {"x": None}])
def test_added_tokens_that_are_none(tmp_path, entry):
    pytest.importorskip("gguf")
    file = sentence_piece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(entry))
    config = type(GROUPED).from_hf_dict(GROUPED.to_hf_dict() | {"vocab_size": 304})
    with pytest.raises(
        ValueError, match="added_tokens.json must give added tokens a text and an id"
    ):
        export_gguf(OpenELM(config, seed=1), tmp_path / "m.gguf", "f16", tokenizer=file)
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_that_came_with_the_model(tmp_path):
    folder = tmp_path / "a"
    OpenELM(GROUPED, seed=1).save_pretrained(folder)
    hugging_face(folder)
    OpenELM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    there, here = (Tokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert there.encode("the cat") == here.encode("the cat")


def test_packing_keeps_what_is_said(source):
    model = OpenELM.from_pretrained(source)
    pack(model)
    assert model.config.eos_token_ids == (77, 9)
