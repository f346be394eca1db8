"""Checkpoints: round trips, what a broken one reports, and saves killed at every step."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN
from helpers.checkpoints import CONFIG, assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elmkernels.openelm import OpenELM, OpenELMConfig

UNTIED = OpenELMConfig(num_transformer_layers=1, model_dim=64, head_dim=16, vocab_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_round_trip(tmp_path, config, dtype):
    model = OpenELM(config, seed=1, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert_same(OpenELM.from_pretrained(tmp_path), model)
    stored = json.loads((tmp_path / "config.json").read_text())["torch_dtype"]
    assert getattr(torch, stored) == dtype


def test_sharded_round_trip(tmp_path):
    model = OpenELM(CONFIG, seed=1)
    model.save_pretrained(tmp_path, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == 4 * CONFIG.num_parameters
    largest = 4 * max(weight.numel() for weight in model.parameters())
    for shard in shards:
        assert sum(w.nbytes for w in load_file(tmp_path / shard).values()) <= max(60_000, largest)
    assert_same(OpenELM.from_pretrained(tmp_path), model)


def test_saving_over_another_layout_leaves_nothing_stale(tmp_path):
    model = OpenELM(CONFIG, seed=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    for shard_bytes in (60_000, 120_000, None, 60_000):
        model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
        names = set(os.listdir(tmp_path)) - {"config.json", "tokenizer.json"}
        if shard_bytes is None:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            expected = {"model.safetensors.index.json", *index["weight_map"].values()}
            assert names == expected
    assert (tmp_path / "tokenizer.json").exists()
    assert_same(OpenELM.from_pretrained(tmp_path), model)


def test_hugging_face_layout_is_written_key_for_key(tmp_path, hf_tiny):
    theirs = GOLDEN / "hf_tiny" / "model.safetensors"
    model = OpenELM.from_pretrained(theirs.parent)
    model.save_pretrained(tmp_path)
    expected, got = load_file(theirs), load_file(tmp_path / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(weight, got[key]) for key, weight in expected.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with torch.inference_mode():
        ids = hf_tiny.tensors["input_ids"]
        assert torch.equal(model(ids), hf_tiny.model()(ids))


def test_written_tensors_are_aligned(tmp_path):
    OpenELM(CONFIG, seed=1, dtype=torch.bfloat16).save_pretrained(tmp_path)
    header = (tmp_path / "model.safetensors").read_bytes()[:8]
    assert (8 + int.from_bytes(header, "little")) % 64 == 0


def test_an_untied_classifier_is_called_lm_head(tmp_path):
    OpenELM(UNTIED, seed=1).save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_dtype_and_device(folder):
    model = OpenELM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}
    assert model.rope_table.dtype == torch.float32
    assert OpenELM.from_pretrained(folder, device="meta").norm.weight.is_meta
    with pytest.raises(ValueError, match="dtype must be one of .*got torch.int8"):
        OpenELM.from_pretrained(folder, dtype=torch.int8)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_weights_are_mapped_and_private(folder, tmp_path, layout):
    path = folder / "model.safetensors"
    if layout == "pt":
        path = tmp_path / "model.pt"
        torch.save(OpenELM(CONFIG, seed=1).state_dict(), path)
    model = OpenELM.from_pretrained(path, config=CONFIG)
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for name, weight in model.named_parameters():
        assert any(a <= weight.data_ptr() < b for a, b in spans), name
    before = path.read_bytes()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert path.read_bytes() == before


def test_training_and_saving_over_the_mapped_file(folder):
    model = OpenELM.from_pretrained(folder)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.sub_(weight.grad)
    model.save_pretrained(folder)
    assert_same(OpenELM.from_pretrained(folder), model)


@pytest.mark.parametrize("nested", [False, True], ids=["bare", "training checkpoint"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_corenet_file(tmp_path, nested, zipped):
    model, path = OpenELM(UNTIED, seed=1), tmp_path / "checkpoint.pt"
    state = model.state_dict()
    assert "classifier.weight" in state
    values = {"epoch": 3, "model_state_dict": state} if nested else state
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    assert_same(OpenELM.from_pretrained(path, config=UNTIED), model)


def test_corenet_file_with_its_yaml(tmp_path):
    pytest.importorskip("yaml")
    text = "model: {language_modeling: {general_gpt: {model_name: OpenELM-270M, vocab_size: 32}}}"
    (tmp_path / "config.yaml").write_text(text)
    config = OpenELMConfig.from_name("OpenELM-270M", vocab_size=32)
    path = tmp_path / "checkpoint.pt"
    one = torch.zeros(1, dtype=torch.bfloat16)
    torch.save({n: one.expand(shape) for n, shape in config.parameter_shapes().items()}, path)
    assert path.stat().st_size < 1e6
    model = OpenELM.from_pretrained(path, config=tmp_path / "config.yaml", device="meta")
    assert model.config == config
    with pytest.raises(ValueError, match=r"shape: token_embeddings.weight must be \[32000, 1280\]"):
        OpenELM.from_pretrained(path, config="OpenELM-270M")


@pytest.mark.parametrize("config", ["OpenELM-270", 5])
def test_a_single_file_needs_a_configuration(folder, config):
    with pytest.raises(ValueError, match="config must be .*OpenELM-3B to load the single file"):
        OpenELM.from_pretrained(folder / "model.safetensors", config=config)


def test_a_folder_takes_no_configuration(folder):
    with pytest.raises(ValueError, match="config must not be given with a folder"):
        OpenELM.from_pretrained(folder, config=CONFIG)


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    weights = {key: weight.clone() for key, weight in load_file(file).items()}
    change(weights)
    save_file(weights, file)


def test_what_does_not_fit_is_reported_at_once(folder):
    def change(weights):
        del weights["transformer.norm.weight"]
        del weights["transformer.layers.2.ffn.proj_1.weight"]
        weights["transformer.layers.7.attn_norm.weight"] = torch.ones(64)
        weights["lm_head.weight"] = torch.ones(96, 64)
        weights["transformer.layers.0.attn.q_norm.weight"] = torch.ones(8)
        weights["transformer.ffn_norm"] = torch.ones(1)
        weights["transformer.layers.1.ffn_norm.weight"] = torch.ones(64, dtype=torch.int64)

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        OpenELM.from_pretrained(folder)
    assert str(error.value).splitlines() == [
        f"{folder} does not fit its configuration:",
        "  dtype: transformer.layers.1.ffn_norm.weight must be floating point, got I64;",
        "  missing: transformer.layers.2.ffn.proj_1.weight [256, 64];",
        "  missing: transformer.norm.weight [64];",
        "  shape: transformer.layers.0.attn.q_norm.weight must be [16], got [8] "
        "in model.safetensors;",
        "  and 3 more",
    ]


def test_a_file_without_a_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config must be .*OpenELM-3B to load the single file"):
        OpenELM.from_pretrained(folder / "model.safetensors")


def test_many_problems_are_counted(folder):
    rewrite(folder, lambda weights: [weights.pop(key) for key in sorted(weights)[:11]])
    with pytest.raises(ValueError) as error:
        OpenELM.from_pretrained(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == 6 and lines[-1] == "  and 7 more"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "path must be the folder .*, which holds config.json, got its file"),
        ("model.gguf", "path must be a checkpoint folder, got the GGUF file .*model.gguf"),
    ],
)
def test_a_file_where_a_folder_is_meant(folder, name, message):
    (folder / name).touch()
    with pytest.raises(ValueError, match=message):
        OpenELM.from_pretrained(folder / name)


def test_a_key_stored_twice(folder):
    rewrite(folder, lambda weights: weights.update({"norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"unexpected: (transformer\.)?norm.weight \[64\]"):
        OpenELM.from_pretrained(folder)


def test_a_configuration_that_contradicts_the_weights(folder):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_kv_heads": [1, 1, 1]}))
    with pytest.raises(ValueError, match=r"shape: .*layers.2.attn.qkv_proj.* must be \[96, 64\]"):
        OpenELM.from_pretrained(folder)


def test_other_values_in_a_corenet_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(OpenELM(UNTIED, seed=1).state_dict() | {"norm.weight": 5, "extra": "x"}, path)
    with pytest.raises(ValueError, match="unexpected: extra") as error:
        OpenELM.from_pretrained(path, config=UNTIED)
    assert "shape: norm.weight must be [64], got []" in str(error.value)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        OpenELM.from_pretrained(path, config=UNTIED)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        OpenELM.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*index.json"):
        OpenELM.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        OpenELM.from_pretrained(folder)


def test_missing_shards(tmp_path):
    OpenELM(CONFIG, seed=1).save_pretrained(tmp_path, max_shard_bytes=60_000)
    shards = sorted(tmp_path.glob("model-*"))
    shards[0].unlink()
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name}, {shards[1].name}, not found"):
        OpenELM.from_pretrained(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {"a": 5}, {"a": "../model.safetensors"}])
def test_broken_index(tmp_path, weight_map):
    OpenELM(CONFIG, seed=1).save_pretrained(tmp_path, max_shard_bytes=60_000)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json: weight_map must map keys to file names"):
        OpenELM.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -1], ids=["empty", "length", "header", "last byte"])
@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_truncated_weights(folder, tmp_path, layout, size):
    path = folder / "model.safetensors"
    if layout == "pt":
        path = tmp_path / "model.pt"
        torch.save(OpenELM(CONFIG, seed=1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{path} is not a complete"):
        OpenELM.from_pretrained(path, config=CONFIG)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_foreign_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"<!doctype html>" * 100)
    with pytest.raises(ValueError, match=f"{name} is not a complete"):
        OpenELM.from_pretrained(tmp_path / name, config=CONFIG)


class Unsafe:
    def __reduce__(self):
        return (os.getcwd, ())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"norm.weight": Unsafe()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt is not a complete torch.save file"):
        OpenELM.from_pretrained(tmp_path / "model.pt", config=CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": ', "config.json.* is not valid JSON"),
        ("\x00\xff", "config.json.* is not valid JSON"),
        ("[1]", "config.json.* must hold a JSON object, got list"),
        ('{"model_type": "llama"}', "config.json: model_type must be 'openelm', got 'llama'"),
        ("{}", "config.json: model_type must be 'openelm', got None"),
        (
            '{"model_type": "openelm"}',
            "config.json: the configuration lacks num_transformer_layers",
        ),
    ],
)
def test_broken_configuration(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        OpenELM.from_pretrained(folder)


def test_saving_refuses(tmp_path, folder):
    model = OpenELM(CONFIG, seed=1)
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        model.save_pretrained(tmp_path, max_shard_bytes=0)
    with pytest.raises(ValueError, match="path must be a folder"):
        model.save_pretrained(folder / "config.json")
    model.layers[1].ffn.proj_1 = torch.nn.Linear(64, 8, bias=True)
    with pytest.raises(ValueError, match="layers.1.ffn.proj_1.bias, layers.1.ffn.proj_1.weight"):
        model.save_pretrained(folder)
    assert_same(OpenELM.from_pretrained(folder), OpenELM(CONFIG, seed=1))


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("tqdm", [True, False])
def test_progress_on_a_terminal_only(folder, monkeypatch, capsys, tqdm):
    if tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    OpenELM.from_pretrained(folder)
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        OpenELM.from_pretrained(folder)
    assert "loading model" in terminal.text
