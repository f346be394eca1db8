"""Folders of quantized and packed models: what is in them, how they are loaded, what is refused."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import GROUPED, assert_same
from safetensors.torch import load_file, save_file

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize
from elmkernels.openelm.compressed import Compressed, CompressedLinear, weight_of

UNTIED = OpenELMConfig.from_hf_dict(GROUPED.to_hf_dict() | {"share_input_output_layers": False})
IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(4))
FORMS = {
    "4 bits": lambda m, **how: quantize(m, 4, 32, **how),
    "8 bits": lambda m, **how: quantize(m, 8, 32, **how),
    "packed12": pack,
}
PACKED_PARTS = ["escape_columns", "escape_starts", "escape_values", "exponents", "packed"]


def made(form: str, config: OpenELMConfig = GROUPED, **how) -> OpenELM:
    model = OpenELM(config, seed=1, dtype=torch.bfloat16)
    FORMS[form](model, **how)
    return model


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    weights = {key: weight.clone() for key, weight in load_file(file).items()}
    change(weights)
    save_file(weights, file)


def reconfigure(folder: Path, **values) -> None:
    file = folder / "config.json"
    kept = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("config", [GROUPED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path, form, config, embeddings, shard_bytes):
    model = made(form, config, embeddings=embeddings)
    model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes is None)
    loaded = OpenELM.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert isinstance(loaded.token_embeddings, Compressed) == embeddings
    assert torch.equal(loaded(IDS), model(IDS))
    assert torch.equal(copy.deepcopy(loaded)(IDS), model(IDS))


@pytest.mark.parametrize("form", FORMS)
def test_an_accelerated_model_is_saved_as_what_it_is(tmp_path, form):
    model = made(form)
    accelerate(model, backend="reference")
    model.save_pretrained(tmp_path)
    assert_same(OpenELM.from_pretrained(tmp_path), made(form))


def test_what_a_quantised_folder_holds(tmp_path):
    """The keys, shapes and dtypes that mlx_lm writes."""
    made("4 bits", UNTIED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4}
    stored = load_file(tmp_path / "model.safetensors")
    shapes = UNTIED.parameter_shapes()
    assert len(stored) == sum(3 if len(shape) == 2 else 1 for shape in shapes.values())
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        key = "lm_head" if module == "classifier" else f"transformer.{module}"
        weight = stored[f"{key}.weight"]
        if len(shape) == 1:
            assert weight.shape == shape
            continue
        assert weight.dtype == torch.uint32 and weight.shape == (shape[0], shape[1] // 8)
        for part in ("scales", "biases"):
            assert stored[f"{key}.{part}"].dtype == torch.bfloat16
            assert stored[f"{key}.{part}"].shape == (shape[0], shape[1] // 32)


def test_what_a_packed_folder_holds(tmp_path):
    made("packed12").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["elmkernels"] == {"format": "packed12", "version": 1}
    prefix = "transformer.layers.0.ffn.proj_1."
    keys = load_file(tmp_path / "model.safetensors")
    assert sorted(k.removeprefix(prefix) for k in keys if k.startswith(prefix)) == PACKED_PARTS


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_mapped_and_aligned(tmp_path, form):
    made(form).save_pretrained(tmp_path)
    model = OpenELM.from_pretrained(tmp_path)
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.numel():
            assert any(a <= tensor.data_ptr() < b for a, b in spans), name
            assert tensor.data_ptr() % tensor.element_size() == 0, name
            if tensor.nbytes % 64 == 0:
                assert tensor.data_ptr() % 64 == 0, name
    streams = [t for name, t in state.items() if "proj" in name and t.dim() > 1]
    assert all(t.data_ptr() % 64 == 0 for t in streams)


@pytest.mark.parametrize("form", FORMS)
def test_saving_over_the_folder_a_model_is_mapped_from(tmp_path, form):
    made(form).save_pretrained(tmp_path)
    mapped = OpenELM.from_pretrained(tmp_path)
    mapped.save_pretrained(tmp_path)
    assert_same(OpenELM.from_pretrained(tmp_path), made(form))
    OpenELM(GROUPED, seed=5).save_pretrained(tmp_path)
    assert_same(mapped, made(form))  # still that of the file that has no name any more
    assert_same(OpenELM.from_pretrained(tmp_path), OpenELM(GROUPED, seed=5))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("form", FORMS)
def test_dtype(tmp_path, form):
    made(form).save_pretrained(tmp_path)
    assert_same(OpenELM.from_pretrained(tmp_path, dtype=torch.bfloat16), made(form))
    if form == "packed12":
        with pytest.raises(ValueError, match="dtype must be bfloat16 .* got torch.float32.*unpack"):
            OpenELM.from_pretrained(tmp_path, dtype=torch.float32)
        return
    model = OpenELM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.activation_dtype == model.token_embeddings.dtype == torch.float32
    assert_same(model, made(form).float())
    assert model(IDS).dtype == torch.float32


def test_a_packed_model_that_was_cast(tmp_path):
    model = made("packed12").float()
    model.save_pretrained(tmp_path)
    loaded = OpenELM.from_pretrained(tmp_path)
    assert loaded.token_embeddings.dtype == torch.float32
    assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize("form", FORMS)
def test_on_the_meta_device(tmp_path, form):
    made(form).save_pretrained(tmp_path)
    model = OpenELM.from_pretrained(tmp_path, device="meta")
    assert all(t.is_meta for t in model.state_dict().values())
    shapes = [weight_of(m).shape for m in model.modules() if isinstance(m, CompressedLinear)]
    assert shapes == [tuple(s) for n, s in GROUPED.parameter_shapes().items() if "proj" in n]


@pytest.mark.parametrize("size", [0, 5, 300, -1], ids=["empty", "length", "header", "last byte"])
@pytest.mark.parametrize("form", ["4 bits", "packed12"])
def test_truncated(tmp_path, form, size):
    made(form).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{path} is not a complete"):
        OpenELM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        ("4 bits", {"quantization": None}, "holds quantized weights, but no .*`quantization`"),
        ("packed12", {"elmkernels": None}, "holds packed12 weights, but no .*`elmkernels`"),
        ("4 bits", {"elmkernels": {"format": "packed12", "version": 1}}, "exclude each other"),
        (
            "packed12",
            {"elmkernels": {"format": "packed12", "version": 2}},
            "elmkernels must be .*'version': 1.*got .*'version': 2",
        ),
        ("packed12", {"elmkernels": "packed12"}, "elmkernels must be .*got 'packed12'"),
        (
            "4 bits",
            {"quantization": {"group_size": 32, "bits": 8}},
            r"shape: .*proj_1.weight must be \[64, 16\].*'bits': 8.* got \[64, 8\]",
        ),
        (
            "4 bits",
            {"quantization": {"group_size": 64, "bits": 4}},
            r"shape: .*qkv_proj.scales must be \[64, 1\].*'group_size': 64.* got \[64, 2\]",
        ),
        ("4 bits", {"quantization": {"group_size": 32, "bits": 3}}, "bits must be 8 or 4, got 3"),
        ("4 bits", {"quantization": {"bits": 4}}, "must have bits and group_size"),
        (
            "4 bits",
            {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
            "must be of mode 'affine' .* got 'mxfp4'",
        ),
        (
            "4 bits",
            {"quantization": {"group_size": 32, "bits": 4, "lm_head": {"bits": 8}}},
            "the same for every matrix, got 'affine', and lm_head",
        ),
    ],
)
def test_a_configuration_that_contradicts_the_weights(tmp_path, form, values, message):
    made(form).save_pretrained(tmp_path)
    reconfigure(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        OpenELM.from_pretrained(tmp_path)


def test_compression_that_is_only_announced(tmp_path):
    OpenELM(GROUPED, seed=1).save_pretrained(tmp_path)
    reconfigure(tmp_path, quantization={"group_size": 32, "bits": 4})
    with pytest.raises(ValueError, match="says .*'bits': 4.*but no weight is stored so"):
        OpenELM.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    made("4 bits").save_pretrained(tmp_path)

    def change(weights):
        del weights["transformer.layers.0.attn.out_proj.biases"]
        scales = "transformer.layers.1.ffn.proj_2.scales"
        weights[scales] = weights[scales][:, :1].clone()
        words = "transformer.layers.2.ffn.proj_2.weight"
        weights[words] = weights[words].view(torch.int32)

    rewrite(tmp_path, change)
    with pytest.raises(ValueError) as error:
        OpenELM.from_pretrained(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        ["dtype:", "transformer.layers.2.ffn.proj_2.weight"],
        ["missing:", "transformer.layers.0.attn.out_proj.biases"],
        ["shape:", "transformer.layers.1.ffn.proj_2.scales"],
    ]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("escape_starts", lambda t: t.add_(1), "escape_starts must be rising from 0"),
        ("escape_starts", lambda t: t[1].fill_(9999), "escape_starts must be rising from 0"),
        ("escape_columns", lambda t: t[-1].fill_(64), r"escape_columns must be in \[0, 64\)"),
        ("escape_columns", lambda t: t[0].fill_(-1), r"escape_columns must be in \[0, 64\)"),
        ("escape_starts", lambda t: t[1:].fill_(t[-1]), "escape_columns must be ascending within"),
        ("escape_values", None, r"escape_values must be \[.*, got \["),
    ],
)
def test_escapes_that_point_outside_of_a_weight(tmp_path, part, change, message):
    """A kernel trusts them: a damaged file must not make it read or write elsewhere."""
    model = made("packed12")
    name, module = next(
        (n, m) for n, m in model.named_modules()
        if isinstance(m, CompressedLinear) and m.escape_columns.numel() > 1 and m.in_features == 64
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    key = f"transformer.{name}.{part}"

    def damage(weights):
        if change is None:
            weights[key] = weights[key][:-1].clone()
        else:
            change(weights[key])

    rewrite(tmp_path, damage)
    with pytest.raises(ValueError, match=f"{name} is damaged: .*{message}"):
        OpenELM.from_pretrained(tmp_path)


def test_a_single_file_does_not_say_how_it_is_compressed(tmp_path):
    made("8 bits").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds quantized weights, but no config.json"):
        OpenELM.from_pretrained(tmp_path / "model.safetensors", config=GROUPED)


def test_mixed_forms_are_not_saved(tmp_path):
    model = made("4 bits", embeddings=False)
    model.token_embeddings = made("8 bits").token_embeddings
    with pytest.raises(ValueError, match="one form of weights, .*'bits': 4.* beside .*'bits': 8"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("form", "bits"), [("4 bits", 4), ("8 bits", 8)])
def test_mlx_reads_the_folder(tmp_path, form, bits):
    """mlx_lm's OpenELM on our folder: its dequantized weights are ours, and so are its logits."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model = made(form).float()
    model.save_pretrained(tmp_path)
    mx.set_default_device(mx.cpu)
    theirs, _ = utils.load_model(tmp_path)
    got = torch.tensor(theirs(mx.array(IDS.tolist())).astype(mx.float32).tolist())
    with torch.inference_mode():
        expected = model(IDS)
        exact = model.double()(IDS)
    # Their sums run in another order: allowed is what float32 itself costs, several times.
    assert (got - exact).abs().max() <= 16 * (expected - exact).abs().max()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
