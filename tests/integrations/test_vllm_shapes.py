"""What vLLM's plugin knows without vLLM: heads, memory and weights of each layer, refusals."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN
from helpers.checkpoints import CONFIG

import elmkernels.integrations.vllm as plugin
from elmkernels import OpenELM, OpenELMConfig
from elmkernels.backends import BACKENDS
from elmkernels.integrations.vllm import pages, shapes, switch, versions, weights
from elmkernels.openelm.checkpoint import read_config
from elmkernels.openelm.config import VARIANTS
from elmkernels.processors import Row
from elmkernels.weights.storage import read_safetensors

ROOT = Path(__file__).parents[2]
UNTIED = OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | {"share_input_output_layers": False})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_shape_is_read_from_any_attributes(name):
    shape = OpenELMConfig.from_name(name)
    values = shape.to_hf_dict() | {"architectures": ["x"], "_name_or_path": "y"}
    read = shapes.shape_of(values)
    assert read.parameter_shapes() == shape.parameter_shapes()
    assert shapes.shape_of({f: getattr(read, f) for f in shapes.FIELDS}) == read


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_process_has_its_share_of_heads(name, size):
    shape = OpenELMConfig.from_name(name)
    for layer in range(shape.num_transformer_layers):
        query, key_value = shapes.heads(shape, layer, size)
        if shape.num_query_heads[layer] % size == 0:
            assert query * size == shape.num_query_heads[layer]
        assert key_value == max(1, shape.num_kv_heads[layer] // size)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_is_by_layer(name):
    shape = OpenELMConfig.from_name(name)
    found = shapes.cache_bytes(shape, 2)
    assert found == [2 * heads * shape.head_dim * 2 for heads in shape.num_kv_heads]
    assert sum(found) < max(found) * len(found)


# Apple's models have layers with an odd number of key/value heads.
@pytest.mark.parametrize("name", VARIANTS)
def test_layers_that_tensor_parallelism_does_not_divide_are_named(name):
    shape = OpenELMConfig.from_name(name)
    odd = [i for i, heads in enumerate(shape.num_kv_heads) if heads % 2 and heads > 1]
    reason = shapes.missing_tensor_parallel(shape, 2)
    assert odd and reason is not None
    assert f"{len(odd)} of {shape.num_transformer_layers} layers" in reason
    first = odd[0]
    assert f"layer {first} has {shape.num_query_heads[first]} query and" in reason
    assert "--pipeline-parallel-size 2 or --data-parallel-size 2" in reason
    assert shapes.missing_tensor_parallel(shape, 1) is None


@pytest.mark.parametrize(
    "query, key_value, ffn, size, fits",
    [
        ((4, 8), (2, 4), 64, 2, True),
        ((4, 8), (1, 2), 64, 2, True),  # one key/value head, on both
        ((4, 8), (1, 2), 64, 4, True),
        ((6, 12), (3, 6), 64, 2, False),
        ((3, 4), (1, 2), 64, 2, False),
        ((6, 6), (2, 3), 96, 6, True),
        ((4, 8), (2, 4), 63, 2, False),
    ],
)
def test_what_divides(query, key_value, ffn, size, fits):
    values = CONFIG.to_hf_dict() | {
        "num_transformer_layers": 2, "num_query_heads": query, "num_kv_heads": key_value,
        "qkv_multipliers": 1.0, "ffn_multipliers": ffn / CONFIG.model_dim, "ffn_dim_divisor": ffn,
    }  # fmt: skip
    shape = shapes.shape_of(values)
    assert (shapes.missing_tensor_parallel(shape, size) is None) is fits


def test_no_more_stages_than_layers_and_no_more_tokens_than_positions():
    layers, length = CONFIG.num_transformer_layers, CONFIG.rope_max_length
    assert shapes.missing_pipeline(CONFIG, layers) is None
    assert f"at most the {layers} layers, got 9" in shapes.missing_pipeline(CONFIG, 9)
    assert shapes.missing_length(CONFIG, length) is None
    assert f"at most the {length} positions" in shapes.missing_length(CONFIG, length + 1)
    many = shapes.missing_tensor_parallel(OpenELMConfig.from_name("OpenELM-3B"), 64)
    assert "pipeline" not in many and many.count("layer ") == 8 and "28 more" in many


@pytest.mark.parametrize(
    "said, word",
    [
        ({}, None),
        ({"quantization": None}, None),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantized"),
        ({"elmkernels": {"format": "packed12", "version": 1}}, "packed12"),
    ],
)
def test_compressed_weights_are_refused_with_the_command(said, word):
    reason = shapes.missing_form(CONFIG.to_hf_dict() | said, "models/m")
    if word is None:
        assert reason is None
    else:
        command = "elmkernels convert --checkpoint models/m --to plain --out models/m-plain"
        assert word in reason and reason.endswith(command) and "\n" not in reason


def test_a_folder_without_a_tokenizer_is_known(tmp_path):
    reason = shapes.missing_tokenizer(str(tmp_path))
    assert "--skip-tokenizer-init" in reason and "--tokenizer FOLDER" in reason
    assert shapes.missing_tokenizer("a-repository/of-the-hub") is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert shapes.missing_tokenizer(str(tmp_path)) is None


def stored(config: OpenELMConfig, folder: Path) -> dict[str, torch.Tensor]:
    OpenELM(config, seed=1).save_pretrained(folder)
    return {s.key: s.read() for s in read_safetensors(folder / "model.safetensors")}


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_tensor_has_its_place(tmp_path, config, prefix):
    """Under Apple's names and CoreNet's; a projection beside a shared one is passed over."""
    held = stored(config, tmp_path)
    if not prefix:
        bare = {name.removeprefix("transformer."): w for name, w in held.items()}
        held = {name.replace("lm_head.", "classifier."): w for name, w in bare.items()}
    found = dict(weights.mapped(config, held.items()))
    assert {name: tuple(w.shape) for name, w in found.items()} == weights.expected(config)
    assert ("lm_head.weight" in found) is not config.share_input_output_layers
    extra = {"lm_head.weight": torch.zeros(config.vocab_size, config.model_dim)}
    assert dict(weights.mapped(config, (held | extra).items())).keys() == found.keys()


def test_apple_s_folder_has_all_of_it():
    folder = GOLDEN / "hf_tiny"
    config = read_config(folder)
    held = [(s.key, s.read()) for s in read_safetensors(folder / "model.safetensors")]
    assert dict(weights.mapped(config, held)).keys() == weights.expected(config).keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer.layers.0.attn.rope": (3,)}, "transformer.layers.0.attn.rope must be a"),
        ({"transformer.norm.weight": (65,)}, r"transformer.norm.weight must be \[64\], got \[65\]"),
        ({"layers.9.norm.weight": (64,)}, "layers.9.norm.weight must be a tensor of the model"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    held = stored(CONFIG, tmp_path) | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        dict(weights.mapped(CONFIG, held.items()))


def test_a_tensor_that_is_missing_is_named():
    """Of those that the process holds: in a pipeline others hold the rest."""
    names = list(weights.expected(CONFIG))
    weights.check_complete(CONFIG, names, names, "m")
    weights.check_complete(CONFIG, names[:5], names[:5], "m")
    with pytest.raises(ValueError, match=rf"^m lacks {names[2]}$"):
        weights.check_complete(CONFIG, names, [*names[:2], *names[3:]], "m")
    with pytest.raises(ValueError, match=f"and {len(names) - 4} more$"):
        weights.check_complete(CONFIG, names, [], "m")


def test_which_ops_run_is_said_in_one_line():
    names = [name for name in switch.CUSTOM_OPS if name != "elmkernels_linear"]
    line = switch.line(dict.fromkeys(names, "avx2"), "cpu")
    assert line.startswith("elmkernels runs rms_norm (avx2), add_rms_norm (avx2), qk_norm_rope")
    assert "vLLM" not in line
    line = switch.line(dict.fromkeys(names, "avx2") | {names[-1]: None}, "cpu")
    assert "vLLM's own run swiglu: " in line and "\n" not in line
    line = switch.line(dict.fromkeys(names), "xpu")
    assert line.startswith("vLLM's own run rms_norm") and "not for xpu" in line


@pytest.mark.parametrize("name", switch.CUSTOM_OPS)
def test_an_op_takes_a_backend_that_can_run_here(name):
    backend = switch.backend_of(name, "cpu")
    assert backend is None or BACKENDS[backend].missing is None
    assert (backend is None) is (switch.missing("cpu") is not None)
    assert switch.backend_of(name, "xpu") is None


def test_products_of_few_rows_are_ours_where_that_was_measured(monkeypatch):
    monkeypatch.setattr(switch, "SERVED", {("kind", torch.bfloat16): Row(16, "2 cores")})
    monkeypatch.setattr(switch, "KIND", "kind")
    there = switch.missing("cpu") is None
    assert switch.most_rows(torch.bfloat16, "cpu") == (16 if there else 0)
    assert switch.most_rows(torch.float32, "cpu") == switch.most_rows(torch.bfloat16, "cuda") == 0
    assert switch.products_line(16, torch.bfloat16, "cpu").startswith("elmkernels multiplies up to")
    said = switch.products_line(0, torch.float32, "cpu")
    assert said.startswith("vLLM's own run linear: ") and (not there or "float32" in said)


@pytest.mark.parametrize("shapes_of", [[(3, 5)], [(1, 1)] * 3, [(70, 129), (8, 64)], [(0, 4)]])
def test_large_pages_hold_copies(shapes_of):
    """Each its own, from a cache line on, also if they outgrow what is asked for at once."""
    kept = pages.LargePages()
    given = [torch.randn(size).bfloat16() for size in shapes_of] * 3
    found = [kept.copy(tensor) for tensor in given]
    for tensor, copy in zip(given, found, strict=True):
        assert torch.equal(tensor, copy) and copy.is_contiguous()
        assert not tensor.numel() or copy.data_ptr() % 64 == 0
    found[0].fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(given[1:], found[1:], strict=True))


def test_large_pages_go_on_in_more_memory(monkeypatch):
    monkeypatch.setattr(pages, "_CHUNK", 8192)
    kept = pages.LargePages()
    given = [torch.randn(n) for n in (1000, 900, 5000, 3)]
    found = [kept.copy(tensor) for tensor in given]
    assert all(torch.equal(a, b) for a, b in zip(given, found, strict=True))


def test_a_version_that_was_not_run_is_warned_of():
    assert versions.warning(versions.TESTED[0]) is None
    said = versions.warning("0.99.0")
    assert versions.TESTED[0] in said and "0.99.0" in said


def test_a_vllm_without_the_interfaces_is_named(monkeypatch):
    import types

    fake = types.ModuleType("vllm")
    fake.__version__ = "0.1.0+cpu"
    monkeypatch.setitem(sys.modules, "vllm", fake)
    reason = versions.missing_interfaces()
    assert "vLLM 0.1.0 has no vllm.transformers_utils" in reason and "pip install vllm==" in reason


def test_the_entry_point_is_the_plugin():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]' in text
    assert 'elmkernels = "elmkernels.integrations.vllm:register"' in text
    assert callable(plugin.register)
    found = metadata.entry_points(group="vllm.general_plugins")
    assert all(e.value.endswith(":register") for e in found if e.name == "elmkernels")


def test_nothing_of_the_plugin_needs_vllm_to_be_read():
    """What the package's __init__ imports is this package's own, and torch."""
    there = sys.stdlib_module_names | {"torch"}
    for name in ("__init__", "shapes", "weights", "switch", "versions", "pages"):
        path = Path(plugin.__file__).with_name(f"{name}.py")
        tops = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)]
        assert all(a.name.partition(".")[0] in there for n in tops for a in n.names)
