"""Folders into transformers and out of it: Apple's, ours plain, quantized and packed12."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.golden import load_hf_tiny
from helpers.transformers_models import APPLE, KINDS, body, ids, shape, wrapped

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import elmkernels
from elmkernels import hf
from elmkernels.openelm import OpenELM

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def apple(tmp_path):
    """A copy of the golden folder, which a test may change."""
    shutil.copytree(APPLE, tmp_path / "apple", ignore=shutil.ignore_patterns("expected*"))
    return tmp_path / "apple"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model, tokens):
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("kernels", ["auto", "reference", None])
def test_apples_folder_gives_apples_numbers(kernels):
    golden = load_hf_tiny()
    model = load(APPLE, kernels=kernels)
    assert isinstance(model, hf.OpenELMForCausalLM) and not model.training
    assert (model.report is None) == (kernels is None)
    got = logits(model, golden.tensors["input_ids"])
    assert (got - golden.tensors["logits"]).abs().max() < 2e-5


def test_golden_logits_by_every_door(apple, tmp_path):
    """One folder: the native class, code of the folder, and this package's own model."""
    golden = load_hf_tiny().tensors
    load(apple, kernels=None).save_pretrained(tmp_path / "stub")
    doors = {
        "native": load(apple),
        "native class": hf.OpenELMForCausalLM.from_pretrained(apple),
        "without kernels": load(apple, kernels=None),
        "remote code": load(tmp_path / "stub", trust_remote_code=True),
        "ours": OpenELM.from_pretrained(apple),
        "ours, accelerated": OpenELM.from_pretrained(apple),
    }
    elmkernels.accelerate(doors["ours, accelerated"])
    for door, model in doors.items():
        error = (logits(model, golden["input_ids"]) - golden["logits"]).abs().max()
        assert error < 2e-5, f"{door}: {error}"


def test_the_report_says_what_was_put_in():
    report = load(APPLE).report
    assert report.accelerated["layers"] == 3 and report.left == []


def test_keys_configuration_and_files_survive_a_round_trip(apple, tmp_path):
    (apple / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 7, "do_sample": False})
    )
    (apple / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (apple / "chat_template.jinja").write_text("{{ messages }}")
    model = load(apple)
    model.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    before, after = (load_file(f / "model.safetensors") for f in (apple, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (apple, saved))
    ignored = {"transformers_version", "torch_dtype", "dtype"}
    assert {k: new.get(k) for k in old.keys() - ignored} == {
        k: old[k] for k in old.keys() - ignored
    }
    assert new["dtype"] == "float32"
    assert not {"per_layer_config", "num_attention_heads", "ffn_dims"} & new.keys()
    assert GenerationConfig.from_pretrained(saved).max_new_tokens == 7
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (saved / name).read_text() == (apple / name).read_text()
    again = load(saved)
    assert torch.equal(logits(again, ids(2, 9)), logits(model, ids(2, 9)))
    ignored = {"_name_or_path": "", "transformers_version": ""}
    assert again.config.to_dict() | ignored == model.config.to_dict() | ignored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_either_library_reads_what_the_other_wrote(kind, writer, tmp_path):
    model = body(**KINDS[kind])
    folder = tmp_path / "saved"
    if writer == "ours":
        model.save_pretrained(folder)
    else:
        hf.OpenELMForCausalLM.from_openelm(model).save_pretrained(folder)
    expected = logits(model, ids(2, 11))
    assert torch.equal(logits(load(folder, kernels=None), ids(2, 11)), expected)
    assert torch.equal(logits(OpenELM.from_pretrained(folder), ids(2, 11)), expected)
    names = set(load_file(folder / "model.safetensors"))
    assert ("lm_head.weight" in names) == (kind == "untied")
    assert all(name.startswith(("transformer.", "lm_head.")) for name in names)


def test_shards(tmp_path):
    model = body()
    model.save_pretrained(tmp_path / "ours", max_shard_bytes=200_000)
    assert (tmp_path / "ours/model.safetensors.index.json").exists()
    loaded = load(tmp_path / "ours", kernels=None)
    assert torch.equal(logits(loaded, ids(1, 8)), logits(model, ids(1, 8)))
    loaded.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    assert torch.equal(
        logits(OpenELM.from_pretrained(tmp_path / "theirs"), ids(1, 8)), logits(model, ids(1, 8))
    )


def compressed(form):
    model = body(torch.bfloat16 if form == "packed12" else torch.float32)
    if form == "packed12":
        elmkernels.pack(model, progress=False)
    else:
        elmkernels.quantize(model, bits=int(form), group_size=32, progress=False)
    return model


@pytest.mark.parametrize("form", ["8", "4", "packed12"])
def test_compressed_folders(form, tmp_path):
    model = compressed(form)
    model.save_pretrained(tmp_path / "ours")
    expected = logits(model, ids(2, 9))
    loaded = load(tmp_path / "ours", kernels=None, device_map="cpu")
    assert torch.equal(logits(loaded, ids(2, 9)), expected)
    assert loaded.dtype == model.norm.weight.dtype
    fast = load(tmp_path / "ours")
    assert fast.report is not None
    fast.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    names = {"elmkernels" if form == "packed12" else "quantization"}
    assert names <= json.loads((tmp_path / "theirs/config.json").read_text()).keys()
    for again in (
        OpenELM.from_pretrained(tmp_path / "theirs"),
        load(tmp_path / "theirs", kernels=None),
    ):
        assert torch.equal(logits(again, ids(2, 9)), expected)
    prompt = ids(2, 9)
    tokens = fast.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    rows = elmkernels.generate(fast.transformer, prompt, 4)
    assert tokens[:, 9:].tolist() == [row.tokens for row in rows]


def test_what_acts_on_models_acts_on_the_one_inside():
    model = load(APPLE, kernels=None)
    tokens = ids(1, 7)
    before = logits(model, tokens)
    report = elmkernels.accelerate(model)
    assert report.accelerated["loss heads"] == 1
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-4)
    elmkernels.restore(model)
    assert torch.equal(logits(model, tokens), before) and model.report is None
    model.accelerate()
    assert model.report is not None
    done = elmkernels.quantize(model, bits=8, group_size=64, progress=False)
    assert done.matrices == 13 and model.report is not None


def test_a_model_that_is_compressed_after_loading_is_saved_so(tmp_path):
    model = load(APPLE)
    elmkernels.quantize(model.transformer, bits=8, group_size=64, progress=False)
    model.save_pretrained(tmp_path / "8")
    assert json.loads((tmp_path / "8/config.json").read_text())["quantization"]["bits"] == 8
    again = load(tmp_path / "8")
    assert torch.equal(logits(again, ids(1, 5)), logits(model, ids(1, 5)))


def test_plain_after_packed_is_saved_plain(tmp_path):
    compressed("packed12").save_pretrained(tmp_path / "packed")
    model = load(tmp_path / "packed")
    elmkernels.unpack(model.transformer, progress=False)
    model.save_pretrained(tmp_path / "plain")
    assert "elmkernels" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert load(tmp_path / "plain").dtype == torch.bfloat16


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
sys.path.insert(0, {root!r})
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
print(type(model).__module__)
model.save_pretrained({folder!r} + "-again")
"""


@pytest.mark.parametrize("form", ["plain", pytest.param("packed12", marks=pytest.mark.ecosystem)])
def test_a_saved_folder_finds_the_package_itself(form, tmp_path):
    folder = tmp_path / "saved"
    model = wrapped(None) if form == "plain" else None
    if form == "packed12":
        model = hf.OpenELMForCausalLM.from_openelm(compressed(form))
    model.save_pretrained(folder)
    script = ALONE.format(root=str(ROOT), folder=str(folder))
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "elmkernels.integrations.huggingface.modeling"
    sources = {path.name for path in (tmp_path / "saved-again").glob("*.py")}
    assert sources == {"configuration_openelm.py", "modeling_openelm.py"}
    stub = (tmp_path / "saved-again/modeling_openelm.py").read_text()
    assert "from elmkernels" in stub and len(stub.splitlines()) < 5


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(place):
    pytest.importorskip("accelerate")
    model = load(APPLE, device_map=place)
    golden = load_hf_tiny()
    got = logits(model, golden.tensors["input_ids"])
    assert (got - golden.tensors["logits"]).abs().max() < 2e-5


def test_offloaded_weights_are_refused(tmp_path):
    """They are there only while their own module is called; here a layer reads its children's."""
    pytest.importorskip("accelerate")
    places = {"transformer.token_embeddings": "cpu", "transformer.norm": "cpu"}
    places |= {f"transformer.layers.{i}": "cpu" if i < 2 else "disk" for i in range(3)}
    with pytest.raises(ValueError, match="device_map must offload nothing, got cpu, disk"):
        load(APPLE, device_map=places, offload_folder=tmp_path / "offload")


def test_the_meta_device_holds_nothing():
    with torch.device("meta"):
        model = hf.OpenELMForCausalLM(AutoConfig.from_pretrained(APPLE))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(load(APPLE, kernels=None).state_dict())
    golden = load_hf_tiny()
    assert torch.equal(
        logits(model, golden.tensors["input_ids"]),
        logits(load(APPLE, kernels=None), golden.tensors["input_ids"]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bfloat16", "auto", None])
def test_dtypes(dtype):
    options = {} if dtype is None else {"dtype": dtype}
    expected = torch.bfloat16 if dtype in (torch.bfloat16, "bfloat16") else torch.float32
    assert load(APPLE, **options).dtype == expected


def test_fresh_weights_are_drawn_as_openelm_draws_them():
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(hf.OpenELMConfig.from_shape(shape()))
    layer, dim = model.transformer.layers[0], model.config.model_dim
    for weight, std in (
        (layer.attn.qkv_proj.weight, dim**-0.5),
        (layer.ffn.proj_2.weight, (2 * 3 * dim) ** -0.5),
        (model.transformer.token_embeddings.weight, dim**-0.5),
    ):
        assert abs(weight.std().item() / std - 1) < 0.05
    assert torch.equal(layer.attn_norm.weight, torch.ones(dim))


def test_weights_that_are_initialized_later_are_drawn_so_too():
    with torch.device("meta"):
        model = hf.OpenELMForCausalLM(hf.OpenELMConfig.from_shape(shape()))
    model.to_empty(device="cpu")
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    model.init_weights()
    layer = model.transformer.layers[1]
    std = (2 * 3 * 128) ** -0.5
    assert abs(layer.attn.out_proj.weight.std().item() / std - 1) < 0.05
    assert torch.isfinite(logits(model, ids(1, 4))).all()


CHANGES = {
    "missing": lambda w: w.pop("transformer.layers.1.ffn.proj_1.weight"),
    "unexpected": lambda w: w.update({"transformer.layers.9.x.weight": torch.ones(2)}),
    "shape": lambda w: w.update({"transformer.norm.weight": torch.ones(7)}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_contradict_the_configuration_are_one_error(kind, apple):
    weights = load_file(apple / "model.safetensors")
    CHANGES[kind](weights)
    save_file(weights, apple / "model.safetensors")
    with pytest.raises(ValueError, match=rf"no checkpoint of its config.json: {kind}: transformer"):
        load(apple)


def test_a_shape_that_makes_no_sense_is_one_error(apple):
    values = json.loads((apple / "config.json").read_text()) | {"num_kv_heads": [3, 2, 2]}
    (apple / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"num_query_heads\[0\] must be a multiple of"):
        load(apple)


def test_kernels_are_checked():
    with pytest.raises(TypeError, match="kernels must be 'auto', a backend's name or None"):
        load(APPLE, kernels=3)
    with pytest.raises(ValueError, match="backend"):
        load(APPLE, kernels="fastest")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="triton"):
            load(APPLE, kernels="triton")


def test_compressed_weights_are_for_one_device(tmp_path):
    compressed("8").save_pretrained(tmp_path / "8")
    with pytest.raises(ValueError, match="device_map must be one device"):
        load(tmp_path / "8", device_map={"transformer": "cpu", "lm_head": "disk"})


def test_a_model_of_another_shape_is_no_body():
    with pytest.raises(ValueError, match="transformer must be of the shape"):
        hf.OpenELMForCausalLM(hf.OpenELMConfig.from_shape(shape()), body(vocab_size=400))


@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens(tied, tmp_path):
    model = wrapped("auto", share_input_output_layers=tied)
    before = logits(model, ids(1, 6))
    model.resize_token_embeddings(330, mean_resizing=False)
    assert model.transformer.config.vocab_size == model.config.vocab_size == 330
    after = logits(model, ids(1, 6))
    assert after.shape[-1] == 330
    torch.testing.assert_close(after[..., :320], before)
    model.save_pretrained(tmp_path / "more")
    assert load(tmp_path / "more").config.vocab_size == 330


def test_the_tokenizer_is_found_by_the_model_type(apple):
    from helpers.tokenizers import hugging_face

    hugging_face(apple)
    tokenizer = AutoTokenizer.from_pretrained(apple)
    assert (
        tokenizer.decode(tokenizer("the cat")["input_ids"], skip_special_tokens=True) == "the cat"
    )
