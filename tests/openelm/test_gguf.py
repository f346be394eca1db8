"""GGUF files: what is in them, and llama.cpp's own logits, tokens and vocabulary from them."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN
from helpers.checkpoints import CONFIG, GROUPED

from elmkernels import OpenELM, OpenELMConfig, pack, quantize, reference
from elmkernels.openelm import greedy
from elmkernels.openelm.gguf import TYPES, export_gguf, rounded

TINY = GOLDEN / "hf_tiny"
SENTENCES = ["the quick brown fox jumps over the lazy dog", "layers have their own widths"] * 9


@pytest.fixture
def model() -> OpenELM:
    return OpenELM.from_pretrained(TINY)


def read(path: Path):
    return pytest.importorskip("gguf").GGUFReader(path)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file in float32."""
    gguf = pytest.importorskip("gguf")
    return {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(path).tensors
    }


def expected(model: OpenELM) -> dict[str, torch.Tensor]:
    """llama.cpp's names of a plain model's weights."""
    found = {"token_embd": model.token_embeddings, "output_norm": model.norm}
    for i, layer in enumerate(model.layers):
        found |= {
            f"blk.{i}.attn_norm": layer.attn_norm,
            f"blk.{i}.attn_qkv": layer.attn.qkv_proj,
            f"blk.{i}.attn_q_norm": layer.attn.q_norm,
            f"blk.{i}.attn_k_norm": layer.attn.k_norm,
            f"blk.{i}.attn_output": layer.attn.out_proj,
            f"blk.{i}.ffn_norm": layer.ffn_norm,
            f"blk.{i}.ffn_down": layer.ffn.proj_2,
        }
    weights = {f"{name}.weight": m.weight.detach() for name, m in found.items()}
    for i, layer in enumerate(model.layers):
        halves = layer.ffn.proj_1.weight.detach().chunk(2)
        for name, half in zip(("ffn_gate", "ffn_up"), halves, strict=True):
            weights[f"blk.{i}.{name}.weight"] = half
    return weights


@pytest.mark.parametrize("type", TYPES)
def test_the_tensors_of_a_file(tmp_path, model, type):
    pytest.importorskip("gguf")
    export_gguf(model, tmp_path / "m.gguf", type)
    got, weights = tensors(tmp_path / "m.gguf"), expected(model)
    assert got.keys() == weights.keys()
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(type, torch.float32)
    for name, w in weights.items():
        if w.dim() == 1:
            assert torch.equal(got[name], w), name
        elif type == "q8_0":
            step = w.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (got[name] - w).unflatten(1, (-1, 32)).abs()
            assert (error <= step * (0.5 + 127 * 2**-11)).all(), name  # the scale is a half
            assert error.amax() > 0
        elif type == "q4_0":
            # The weight of largest magnitude is -8 steps; one of the other sign may be cut at 7.
            step = w.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 8
            error = (got[name] - w).unflatten(1, (-1, 32)).abs()
            assert (error <= step * (1 + 8 * 2**-11)).all(), name
            assert error.amax() > 0
        else:
            assert torch.equal(got[name], w.to(dtype).float()), name


@pytest.mark.parametrize("type", TYPES)
def test_what_a_file_holds_is_known_without_it(tmp_path, model, type):
    pytest.importorskip("gguf")
    export_gguf(model, tmp_path / "m.gguf", type)
    got = tensors(tmp_path / "m.gguf")
    for name, module in (
        ("token_embd", model.token_embeddings),
        ("blk.1.attn_qkv", model.layers[1].attn.qkv_proj),
    ):
        assert torch.equal(rounded(module.weight, type), got[f"{name}.weight"]), name


def test_the_words_of_a_file(tmp_path, model):
    export = pytest.importorskip("gguf") and export_gguf
    export(model, tmp_path / "m.gguf", "bf16", name="tiny")
    fields = {name: f.contents() for name, f in read(tmp_path / "m.gguf").fields.items()}
    config = model.config
    said = {
        "general.architecture": "openelm",
        "general.name": "tiny",
        "openelm.block_count": config.num_transformer_layers,
        "openelm.context_length": config.max_context_length,
        "openelm.embedding_length": config.model_dim,
        "openelm.feed_forward_length": list(config.ffn_dims),
        "openelm.attention.head_count": list(config.num_query_heads),
        "openelm.attention.head_count_kv": list(config.num_kv_heads),
        "openelm.attention.key_length": config.head_dim,
        "openelm.attention.value_length": config.head_dim,
        "openelm.rope.dimension_count": config.head_dim,
        "openelm.rope.freq_base": config.rope_freq_constant,
        "openelm.attention.layer_norm_rms_epsilon": float(np.float32(config.norm_eps)),
        "openelm.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {name: fields[name] for name in said} == said


def test_compressed_models_are_written_as_what_they_stand_for(tmp_path):
    pytest.importorskip("gguf")
    plain, packed = (OpenELM(GROUPED, seed=1, dtype=torch.bfloat16) for _ in range(2))
    pack(packed)
    for name, m in (("plain", plain), ("packed12", packed)):
        export_gguf(m, tmp_path / name, "bf16")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "packed12").read_bytes()
    quantize(packed, 8, 32)
    export_gguf(packed, tmp_path / "quantized", "f32")
    got = tensors(tmp_path / "quantized")["blk.1.attn_qkv.weight"]
    affine = packed.layers[1].attn.qkv_proj.compressed()
    assert torch.equal(got, reference.dense(affine).float())


def without(**values) -> OpenELMConfig:
    return OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | values)


@pytest.mark.parametrize(
    ("config", "type", "message"),
    [
        (CONFIG, "q4_k", "type must be one of f32, f16, bf16, q8_0, q4_0, got 'q4_k'"),
        (CONFIG, "q8_0", r"multiples of 32, layers.1.ffn.proj_2.weight has 80"),
        (CONFIG, "q4_0", r"type q4_0 .* multiples of 32, layers.1.ffn.proj_2.weight has 80"),
        (without(share_input_output_layers=False), "f32", "share_input_output_layers True"),
        (without(normalize_qk_projections=False), "f32", "normalize_qk_projections True"),
        (without(ffn_with_glu=False), "f32", "ffn_with_glu True"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(tmp_path, config, type, message):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=message):
        export_gguf(OpenELM(config, seed=1), tmp_path / "m.gguf", type)
    assert not any(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, model):
    pytest.importorskip("gguf")
    export_gguf(model, tmp_path / "m.gguf", "f32")
    before = (tmp_path / "m.gguf").read_bytes()
    weight = model.layers[1].ffn.proj_2.weight.detach().clone()
    weight[0, 0] = 1e5
    model.layers[1].ffn.proj_2.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match="f16 can't hold .* blk.1.ffn_down.weight"):
        export_gguf(model, tmp_path / "m.gguf", "f16")
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert os.listdir(tmp_path) == ["m.gguf"]
    export_gguf(model, tmp_path / "m.gguf", "bf16")
    assert len((tmp_path / "m.gguf").read_bytes()) < 0.6 * len(before)


def test_a_missing_package_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install gguf \(or elmkernels\[gguf\]\)"):
        export_gguf(model, tmp_path / "m.gguf")


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return tmp_path / "tokenizer.model"


def test_tokenizers_that_do_not_fit(tmp_path, model, tokenizer):
    pytest.importorskip("gguf")
    (tmp_path / "broken").write_bytes(b"no tokenizer")
    small = OpenELM(CONFIG, seed=1)
    for m, path, error, message in (
        (model, tmp_path / "nowhere", FileNotFoundError, "nowhere does not exist"),
        (model, tmp_path / "broken", ValueError, "broken is not a SentencePiece model"),
        (small, tokenizer, ValueError, r"has \d+ tokens, the model's vocab_size is 96"),
    ):
        with pytest.raises(error, match=message):
            export_gguf(m, tmp_path / "m.gguf", tokenizer=path)
    assert not (tmp_path / "m.gguf").exists()


def llama(path: Path, **options):
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = llama_cpp.GGML_TYPE_F32  # of the cache: halves would hide an error of ours
    return llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, verbose=False, type_k=exact, type_v=exact, **options
    )


def test_llama_cpp_computes_the_same_logits(tmp_path, model, hf_tiny):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    export_gguf(model, tmp_path / "m.gguf", "f32")
    ids = hf_tiny.tensors["input_ids"][:1]
    theirs = llama(tmp_path / "m.gguf", logits_all=True)
    theirs.eval(ids[0].tolist())
    got = torch.from_numpy(np.array(theirs.scores[: ids.shape[1]])).double()
    with torch.inference_mode():
        ours = model(ids)[0]
        exact = model.double()(ids)[0]
    # Two implementations in float32: each has an error of the size of the other's.
    assert (got - exact).abs().max() <= 4 * (ours - exact).abs().max()
    assert torch.equal(got.argmax(-1), exact.argmax(-1))


def test_llama_cpp_decodes_the_same_tokens(tmp_path, model, hf_tiny):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    export_gguf(model, tmp_path / "m.gguf", "f32")
    prompt = hf_tiny.tensors["input_ids"][:1, :9]
    theirs = llama(tmp_path / "m.gguf", logits_all=True)
    tokens, new = prompt[0].tolist(), prompt[0].tolist()
    for _ in range(24):
        theirs.eval(new)
        new = [int(theirs.scores[len(tokens) - 1].argmax())]
        tokens += new
    assert tokens[9:] == greedy(model, prompt, 24)[0].tolist()


def test_llama_cpp_tokenises_as_the_tokenizer_does(tmp_path, model, tokenizer):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    sentencepiece = pytest.importorskip("sentencepiece")
    export_gguf(model, tmp_path / "m.gguf", "bf16", tokenizer=tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    theirs = llama(tmp_path / "m.gguf")
    for text in ("the lazy fox", "wide layers, 3 dogs\n", "\u00e9t\u00e9"):
        got = theirs.tokenize(text.encode(), add_bos=True)
        assert got == [processor.bos_id(), *processor.encode(text)], text
    assert theirs.n_vocab() == model.config.vocab_size
    assert theirs.token_eos() == processor.eos_id()
