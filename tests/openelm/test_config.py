"""Head counts and widths against literals, and what a configuration refuses."""

import copy
import functools
import json
import math
from itertools import chain, repeat

import numpy as np
import pytest
from helpers import GOLDEN

from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.openelm.config import VARIANTS, make_divisible


def runs(*pairs: tuple[int, int]) -> tuple[int, ...]:
    """(value, how often) ... spelt out."""
    return tuple(chain.from_iterable(repeat(value, times) for value, times in pairs))


EXPECTED = {  # query heads, feed-forward widths in units of 256, parameters
    "OpenELM-270M": (
        runs((12, 5), (16, 7), (20, 4)),
        (3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20),
        271_527_168,
    ),
    "OpenELM-450M": (
        runs((12, 3), (16, 7), (20, 6), (24, 4)),
        (3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24),
        457_179_136,
    ),
    "OpenELM-1_1B": (
        runs((16, 3), (20, 7), (24, 8), (28, 6), (32, 4)),
        (*range(4, 17), 18, 18, *range(20, 33)),
        1_079_891_456,
    ),
    "OpenELM-3B": (
        runs((12, 4), (16, 14), (20, 12), (24, 6)),
        (6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26)
        + (28, 29, 30, 31, 32, 34, 35, 36, 37, 38, 40, 41, 42, 43, 44, 46, 47, 48),
        3_036_647_424,
    ),
}
GENERAL_GPT = {"model_name": "OpenELM-450M", "vocab_size": 32128, "max_context_length": 2048}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    q_heads, widths, parameters = EXPECTED[name]
    config = OpenELMConfig.from_name(name)
    assert config.num_query_heads == q_heads
    assert config.num_kv_heads == tuple(q // 4 for q in q_heads)
    assert config.ffn_dims == tuple(256 * w for w in widths)
    assert config.num_parameters == parameters


@pytest.mark.parametrize(
    ("short", "name"),
    [("270M", "OpenELM-270M"), ("450m", "OpenELM-450M"), ("1.1b", "OpenELM-1_1B"),
     ("openelm-3b", "OpenELM-3B"), ("OpenELM-1_1B", "OpenELM-1_1B")],
)  # fmt: skip
def test_a_variant_by_the_name_that_people_write(short, name):
    config = OpenELMConfig.from_name(short)
    assert config == OpenELMConfig.from_name(name) and config.model_name == name


@pytest.mark.parametrize("name", ["", "9B", "OpenELM", "270", None, 270, ["270M"]])
def test_no_variant(name):
    with pytest.raises(ValueError, match="name must be one of OpenELM-270M, "):
        OpenELMConfig.from_name(name)


def test_variants_are_four():
    assert set(VARIANTS) == set(EXPECTED)


@pytest.mark.parametrize(
    "config",
    [
        OpenELMConfig.from_name("OpenELM-3B"),
        OpenELMConfig(num_transformer_layers=3, model_dim=64, head_dim=16, ffn_with_glu=False),
    ],
    ids=["3B", "untied"],
)
def test_parameter_shapes_are_the_models(config):
    model = OpenELM(config, device="meta")
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes == config.parameter_shapes()
    assert sum(weight.numel() for weight in model.parameters()) == config.num_parameters


@pytest.mark.parametrize(
    ("value", "divisor", "expected"),
    [(640, 256, 768), (3200, 256, 3328), (100, 256, 256), (290, 200, 400), (512, 256, 512)],
)
def test_make_divisible(value, divisor, expected):
    assert make_divisible(value, divisor) == expected


def small(**fields) -> OpenELMConfig:
    base = dict(num_transformer_layers=4, model_dim=128, head_dim=16, ffn_dim_divisor=16)
    return OpenELMConfig(**base | fields)


def test_number_multipliers_are_uniform():
    config = small(qkv_multipliers=0.5, ffn_multipliers=2)
    assert config.num_query_heads == (4, 4, 4, 4)
    assert config.ffn_multipliers == (2.0, 2.0, 2.0, 2.0)
    assert config.ffn_dims == (256, 256, 256, 256)


def test_pair_multipliers_are_spread_and_rounded():
    config = small(ffn_multipliers=(0.5, 1.5), qkv_multipliers=[0.5, 1.0])
    assert config.ffn_multipliers == (0.5, 0.83, 1.17, 1.5)
    assert config.ffn_dims == (64, 112, 144, 192)
    assert config.num_query_heads == (4, 5, 7, 8)


def test_list_multipliers_are_taken_as_they_are():
    config = small(ffn_multipliers=[0.5, 0.834, 1.17, 1.5], qkv_multipliers=[1, 0.5, 1, 0.5])
    assert config.ffn_multipliers == (0.5, 0.834, 1.17, 1.5)
    assert config.num_query_heads == (8, 4, 8, 4)


def test_two_numbers_for_two_layers_are_a_pair():
    config = small(num_transformer_layers=2, ffn_multipliers=[0.504, 2.0])
    assert config.ffn_multipliers == (0.5, 2.0)


def test_without_glu_proj_1_is_half_as_wide():
    shapes = {glu: small(ffn_with_glu=glu).parameter_shapes() for glu in (True, False)}
    assert shapes[True]["layers.0.ffn.proj_1.weight"] == (1024, 128)
    assert shapes[False]["layers.0.ffn.proj_1.weight"] == (512, 128)
    assert shapes[False]["layers.0.ffn.proj_2.weight"] == (128, 512)


def test_explicit_heads_win_over_multipliers():
    config = small(num_query_heads=[2, 4, 6, 8], num_kv_heads=[1, 2, 2, 8])
    assert config.num_query_heads == (2, 4, 6, 8)
    assert config.parameter_shapes()["layers.2.attn.qkv_proj.weight"] == ((6 + 4) * 16, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_query_heads=[4, 4, 4]), "num_query_heads must have 4 entries.*got 3"),
        (dict(num_query_heads=[4, 0, 4, 4]), r"num_query_heads\[1\] must be a positive.*got 0"),
        (
            dict(num_query_heads=[4, 4, 5, 4], num_kv_heads=[2, 2, 2, 2]),
            r"num_query_heads\[2\] must be a multiple of num_kv_heads\[2\] 2, got 5",
        ),
        (
            dict(num_query_heads=[4, 6, 4, 4], num_gqa_groups=4),
            r"num_query_heads\[1\] must be a multiple of num_gqa_groups 4, got 6",
        ),
        (dict(ffn_multipliers=[1, 2, 3]), "ffn_multipliers must be.*list of 4.*got a list of 3"),
        (dict(qkv_multipliers=[]), "qkv_multipliers must be.*got a list of 0"),
        (dict(ffn_multipliers=-1), "ffn_multipliers must be positive, got -1"),
        (dict(head_dim=15), "head_dim must be even.*got 15"),
        (dict(model_dim=0), "model_dim must be a positive integer, got 0"),
        (dict(vocab_size=1.5), "vocab_size must be a positive integer, got 1.5"),
        (dict(num_transformer_layers=True), "num_transformer_layers must be.*got True"),
        (dict(activation_fn_name="gelu"), "activation_fn_name must be 'swish', got 'gelu'"),
        (dict(normalization_layer_name="layer_norm"), "must be 'rms_norm', got 'layer_norm'"),
        (dict(norm_eps=0), "norm_eps must be a positive number, got 0"),
        (dict(padding_index=32000), r"padding_index must lie in \[0, 32000\), got 32000"),
    ],
)
def test_refuses_values(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize("multipliers", ["0.5", ["a", "b"], None])
def test_refuses_types(multipliers):
    with pytest.raises(TypeError, match="ffn_multipliers must"):
        small(ffn_multipliers=multipliers)


FLOATS = ["norm_eps", "rope_freq_constant"]
BOOLEANS = ["ffn_with_glu", "normalize_qk_projections", "share_input_output_layers"]
INTEGERS = [
    "num_transformer_layers", "model_dim", "head_dim", "num_gqa_groups", "ffn_dim_divisor",
    "rope_max_length", "vocab_size", "max_context_length", "padding_index",
]  # fmt: skip


@pytest.mark.parametrize("name", [*FLOATS, "ffn_multipliers", "qkv_multipliers"])
@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, 1e300, 0, -1.0, True, "1", 10**400]
)
def test_floats_are_finite_numbers(name, value):
    with pytest.raises((ValueError, TypeError), match=f"{name} must"):
        small(**{name: value})
    if name.endswith("multipliers"):
        for values in ([1.0, value], [1.0, 1.0, 1.0, value]):
            with pytest.raises((ValueError, TypeError), match=f"{name} must"):
                small(**{name: values})


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", [0, 1, "false", "x", None, 1.0])
def test_booleans_are_booleans(name, value):
    with pytest.raises(TypeError, match=f"{name} must be true or false, got"):
        small(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.5, 2.0, True, "2", -1, 10**30, math.nan])
def test_integers_are_integers(name, value):
    with pytest.raises((ValueError, TypeError), match=f"{name} must"):
        small(**{name: value})


def test_layers_are_counted_before_they_are_described():
    with pytest.raises(ValueError, match="num_transformer_layers must be at most 10000, got"):
        small(num_transformer_layers=10**9)


def test_numbers_of_numpy_become_pythons():
    given = dict(model_dim=np.int64(128), norm_eps=np.float32(1e-5), ffn_with_glu=np.bool_(True))
    config = small(**given, num_query_heads=list(np.array([4, 4, 4, 4])), padding_index=np.uint8(3))
    assert config == small(
        norm_eps=float(np.float32(1e-5)), num_query_heads=[4] * 4, padding_index=3
    )
    json.dumps(config.to_hf_dict())


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="OpenELM-270M, .*OpenELM-3B, got 'OpenELM-7B'"):
        OpenELMConfig.from_name("OpenELM-7B")


def test_overrides():
    config = OpenELMConfig.from_name("OpenELM-270M", num_transformer_layers=2, vocab_size=96)
    assert config.num_query_heads == (12, 20)
    assert config.vocab_size == 96


def test_hf_dict_of_a_checkpoint_is_kept_key_for_key():
    theirs = json.loads((GOLDEN / "hf_tiny" / "config.json").read_text())
    ours = OpenELMConfig.from_hf_dict(theirs).to_hf_dict()
    assert ours == {k: v for k, v in theirs.items() if k != "torch_dtype"}


def test_a_configuration_says_again_what_it_was_given():
    given = small().to_hf_dict() | {
        "eos_token_id": [7, 9],
        "bos_token_id": None,
        "pad_token_id": 0,
        "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
        "of_somebody": {"nested": [1, None, "x"]},
    }
    config = OpenELMConfig.from_hf_dict(given | {"torch_dtype": "float16", "quantization": {}})
    assert config.to_hf_dict() == given
    assert config == small() and hash(config) == hash(small())
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (7, 9), 0)
    assert copy.deepcopy(config).to_hf_dict() == given
    other = small(vocab_size=50).with_metadata(config.metadata).to_hf_dict()
    assert other == given | {"vocab_size": 50}
    fresh = small()
    assert (fresh.bos_token_id, fresh.eos_token_ids, fresh.pad_token_id) == (1, (2,), None)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id must be a token id, a list of them or null, got 'x'"),
        ({"eos_token_id": [2, 1.5]}, "eos_token_id must be"),
        ({"eos_token_id": True}, "eos_token_id must be"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token id or null"),
        ({"bos_token_id": -5}, "bos_token_id must be"),
        ({"bos_token_id": 2**31}, "bos_token_id must be"),
        ({"eos_token_id": [2, 10**30]}, "eos_token_id must be"),
        ({"pad_token_id": 0.5}, "pad_token_id must be"),
        ({"initializer_range": math.nan}, "initializer_range must be finite, got nan"),
        ({"a": {"b": [1.0, math.inf]}}, r"a.b\[1\] must be finite, got inf"),
        (
            {"a": functools.reduce(lambda inner, _: [inner], range(300), 1)},
            "at most 64 levels deep",
        ),
    ],
)
def test_what_else_is_said_is_checked(said, message):
    with pytest.raises((TypeError, ValueError), match=message):
        OpenELMConfig.from_hf_dict(small().to_hf_dict() | said)


@pytest.mark.parametrize(
    "config",
    [
        OpenELMConfig.from_name("OpenELM-270M", model_name=None),
        small(norm_eps=1e-5, padding_index=3, rope_freq_constant=500000, max_context_length=64),
    ],
    ids=["270M", "unusual"],
)
def test_hf_dict_round_trip(config):
    assert OpenELMConfig.from_hf_dict(json.loads(json.dumps(config.to_hf_dict()))) == config


def test_hf_dict_errors():
    with pytest.raises(ValueError, match="model_type must be 'openelm', got 'llama'"):
        OpenELMConfig.from_hf_dict({"model_type": "llama"})
    with pytest.raises(ValueError, match="lacks model_dim, head_dim"):
        OpenELMConfig.from_hf_dict(
            {"model_type": "openelm", "num_transformer_layers": 2, "vocab_size": 8}
        )


def corenet(section: dict) -> dict:
    return {"model": {"language_modeling": {"name": "general_gpt", "general_gpt": section}}}


def test_corenet_configuration():
    config = OpenELMConfig.from_corenet_yaml(corenet(GENERAL_GPT | {"padding_index": 32000}))
    assert config == OpenELMConfig.from_name("OpenELM-450M", vocab_size=32128, padding_index=32000)


def test_corenet_file(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "openelm.yaml"
    path.write_text(
        "common: &vocabulary 32128\n"
        "model:\n  language_modeling:\n    name: general_gpt\n    general_gpt:\n"
        "      model_name: OpenELM-450M\n      vocab_size: *vocabulary\n      padding_index: null\n"
    )
    assert OpenELMConfig.from_corenet_yaml(path) == OpenELMConfig.from_name(
        "OpenELM-450M", vocab_size=32128
    )
    path.write_text("model: [")
    with pytest.raises(ValueError, match="openelm.yaml is not valid YAML"):
        OpenELMConfig.from_corenet_yaml(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no section model$"),
        ({"model": {"classification": {}}}, "no section model.language_modeling$"),
        (corenet({"vocab_size": 8}), "no model.language_modeling.general_gpt.model_name"),
        (corenet({"model_name": "gpt-test"}), "name must be one of OpenELM-270M"),
    ],
)
def test_corenet_errors(values, message):
    with pytest.raises(ValueError, match=message):
        OpenELMConfig.from_corenet_yaml(values)


def test_configuration_is_hashable_and_frozen():
    config = small()
    assert {config: 1}[small()] == 1
    with pytest.raises(AttributeError):
        config.model_dim = 5
