"""The configuration of transformers: Apple's keys, transformers' names, each layer's own."""

import copy
import pickle

import pytest
from helpers.transformers_models import APPLE, shape

pytest.importorskip("transformers")

from transformers import AutoConfig

from elmkernels import hf
from elmkernels.openelm.config import VARIANTS, OpenELMConfig


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shape_is_that_of_the_package(name):
    config = hf.OpenELMConfig.from_name(name)
    expected = OpenELMConfig.from_name(name)
    assert config.shape.parameter_shapes() == expected.parameter_shapes()
    assert config.hidden_size == expected.model_dim
    assert config.num_hidden_layers == len(config.per_layer_config) == len(expected.ffn_dims)
    assert config.max_position_embeddings == 2048
    for i, layer in enumerate(config.per_layer_config):
        assert layer.num_attention_heads == expected.num_query_heads[i]
        assert layer.num_key_value_heads == expected.num_kv_heads[i]
        assert layer.intermediate_size == expected.ffn_dims[i]
    assert config.num_attention_heads == max(expected.num_query_heads)


def test_every_reader_reads_what_is_written(tmp_path):
    for values in (
        {},
        {"share_input_output_layers": False, "norm_eps": 1e-5, "padding_index": 3},
        {"vocab_size": 32000, "ffn_with_glu": False, "normalize_qk_projections": False},
    ):
        config = hf.OpenELMConfig.from_shape(shape(**values), name_or_path="x")
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.shape == config.shape
        assert again.tie_word_embeddings == config.share_input_output_layers
        assert OpenELMConfig.from_hf_dict(again.to_dict()) == config.shape


def test_it_can_be_copied_and_changed():
    config = AutoConfig.from_pretrained(APPLE)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
        assert other.per_layer_config[1].num_attention_heads == 4
    config.use_cache = False
    config.vocab_size = 400
    assert config.shape.vocab_size == 400 and config.get_text_config() is config
    assert "vocab_size" in repr(config)


def test_their_names_may_be_given():
    config = hf.OpenELMConfig(hidden_size=256, num_hidden_layers=2, head_dim=64)
    assert (config.model_dim, config.num_transformer_layers) == (256, 2)
    assert "hidden_size" not in config.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_dim": 0}, "model_dim must be a positive integer, got 0"),
        ({"activation_fn_name": "gelu"}, "activation_fn_name must be 'swish', got 'gelu'"),
        ({"head_dim": 33}, "head_dim must be even"),
        (
            {"share_input_output_layers": True, "tie_word_embeddings": False},
            r"tie_word_embeddings must be True \(share_input_output_layers\), got False",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        hf.OpenELMConfig(**values)


def test_an_unknown_variant():
    with pytest.raises(ValueError, match="name must be one of OpenELM-270M"):
        hf.OpenELMConfig.from_name("OpenELM-7B")


@pytest.mark.parametrize(("found", "missing"), [("4.57.1", "got 4.57.1"), ("5.2.0", "got 5.2.0")])
def test_an_old_transformers_is_named(found, missing, monkeypatch):
    from elmkernels.integrations.huggingface import versions

    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"needs transformers >= 5\.\d+, {missing}"):
        versions.check_versions()


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    """Its Python blocks are one program, with a small model where the reader has OpenELM-270M."""
    import re
    from importlib.util import find_spec
    from pathlib import Path

    import torch
    from helpers.tokenizers import hugging_face
    from helpers.transformers_models import body

    pytest.importorskip("accelerate")
    page = (Path(__file__).parents[2] / "docs/huggingface.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    if find_spec("peft") is None:
        blocks = [block for block in blocks if "peft" not in block and "qlora" not in block]
    monkeypatch.chdir(tmp_path)
    body(torch.bfloat16).save_pretrained("OpenELM-270M")
    hugging_face(tmp_path / "OpenELM-270M")
    values = '{"pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}'
    (tmp_path / "OpenELM-270M/tokenizer_config.json").write_text(values)
    assert len(blocks) >= 6
    exec(compile("\n".join(blocks), "docs/huggingface.md", "exec"), {})
    assert "accelerated (elmkernels model): 3 layers" in capsys.readouterr().out
    assert (tmp_path / "small/model.safetensors").is_file()
