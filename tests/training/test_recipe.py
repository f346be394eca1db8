"""Recipes: the ready ones' numbers, files of one's own, round trips, errors that name fields."""

import json

import pytest
import yaml

from elmkernels.openelm import OpenELM
from elmkernels.openelm.config import VARIANTS, OpenELMConfig
from elmkernels.training import recipe as recipes
from elmkernels.training.recipe import Recipe, from_mapping, load, model_config, to_mapping

PUBLISHED = {  # max_lr, min_lr, activation checkpointing, beyond one process
    "OpenELM-270M": (5.3e-3, 5.3e-4, False, "ddp"),
    "OpenELM-450M": (3.9e-3, 3.9e-4, True, "ddp"),
    "OpenELM-1_1B": (2.4e-3, 2.4e-4, True, "ddp"),
    "OpenELM-3B": (1.2e-3, 1.2e-4, True, "fsdp"),
}


def write(path, values) -> str:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_s_recipe(name):
    recipe, notes = load(name)
    max_lr, min_lr, checkpointing, parallel = PUBLISHED[name]
    schedule, optimizer, data = recipe.schedule, recipe.optimizer, recipe.data
    assert notes == []
    assert (schedule.max_lr, schedule.min_lr) == (max_lr, min_lr)
    assert (schedule.steps, schedule.warmup_steps) == (350_000, 5_000)
    assert schedule.warmup_init_lr == 1e-6
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.1, 1.0)
    assert recipe.batch.sequences * data.sequence_length == 4 * 1024**2
    assert (data.min_characters, data.min_tokens) == (200, 256)
    assert recipe.loss.z_loss == 1e-4
    assert recipe.engine.precision == "bf16"
    assert recipe.engine.checkpoint_activations is checkpointing
    assert recipe.engine.parallel == parallel
    assert recipe.keep.average == 5
    config = OpenELMConfig.from_name(name, vocab_size=32128, padding_index=32000)
    assert model_config(recipe) == config


def test_the_ready_recipes_are_the_models_and_a_tiny_one():
    assert set(recipes.ready()) == {*VARIANTS, "tiny"}


def test_the_tiny_recipe_is_layer_wise_scaled_and_small():
    recipe, _ = load("tiny")
    config = model_config(recipe)
    assert 500_000 < config.num_parameters < 1_500_000
    assert len(set(config.ffn_dims)) == 4 and len(set(config.num_query_heads)) == 2
    assert (config.vocab_size, recipe.data.sequence_length) == (257, 256)
    assert (recipe.batch.sequences, recipe.schedule.steps) == (16, 200)
    assert sum(p.numel() for p in OpenELM(config).parameters()) == config.num_parameters


@pytest.mark.parametrize("name", [*PUBLISHED, "tiny"])
def test_a_recipe_comes_back_from_yaml_and_json(name):
    recipe, _ = load(name)
    values = to_mapping(recipe)
    assert from_mapping(yaml.safe_load(yaml.safe_dump(values))) == recipe
    assert from_mapping(json.loads(json.dumps(values))) == recipe


def test_what_is_left_out_has_the_defaults(tmp_path):
    assert load(write(tmp_path / "a.yaml", "data:\nbatch: {micro: 2}"))[0] == from_mapping(
        {"batch": {"micro": 2}}
    )
    assert from_mapping({}) == load(write(tmp_path / "b.yaml", ""))[0] == Recipe()


def test_numbers_and_lists_as_people_write_them():
    recipe = from_mapping(
        yaml.safe_load(
            "schedule: {max_lr: 1, min_lr: 3e-4}\n"  # YAML 1.1 has a string for 3e-4
            "data: {train: texts/*.txt, validation: [a, b]}\n"
            "engine: {checkpoint_activations: [0, 2], kernels: triton}\n"
        )
    )
    assert (recipe.schedule.max_lr, recipe.schedule.min_lr) == (1.0, 3e-4)
    assert recipe.data.train == ("texts/*.txt",) and recipe.data.validation == ("a", "b")
    assert recipe.engine.checkpoint_activations == (0, 2) and recipe.engine.kernels == "triton"


def test_a_base_is_replaced_field_by_field_and_its_model_as_a_whole(tmp_path):
    first = {"base": "OpenELM-270M", "data": {"train": ["a"]}, "schedule": {"steps": 6000}}
    write(tmp_path / "first.yaml", first)
    text = "base: first.yaml\nmodel: OpenELM-3B\ndata: {validation: [b]}\nloss:\n"
    recipe, _ = load(write(tmp_path / "second.yaml", text))
    assert recipe.model == "OpenELM-3B"
    assert (recipe.data.train, recipe.data.validation) == (("a",), ("b",))
    assert (recipe.data.min_tokens, recipe.schedule.steps) == (256, 6000)
    assert recipe.loss.z_loss == 1e-4


def test_a_checkpoint_says_its_model(tmp_path):
    config = OpenELMConfig(num_transformer_layers=1, model_dim=32, head_dim=16, vocab_size=300)
    OpenELM(config).save_pretrained(tmp_path / "model")
    values = {"initial": str(tmp_path / "model"), "data": {"sequence_length": 64}}
    recipe, notes = load(write(tmp_path / "a.yaml", values))
    assert model_config(recipe) == config and notes == []
    _, notes = load(write(tmp_path / "b.yaml", {**values, "model": "OpenELM-3B"}))
    assert len(notes) == 1 and notes[0].startswith("model: ignored")
    single = from_mapping({"initial": str(tmp_path / "gone.pt"), "model": "OpenELM-3B"})
    with pytest.raises(FileNotFoundError, match="gone.pt does not exist"):
        model_config(single)
    (tmp_path / "gone.pt").touch()
    assert model_config(single) == OpenELMConfig.from_name("OpenELM-3B")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dta": {}}, "a recipe has no field dta: did you mean data?"),
        ({"xyzzy": {}}, "a recipe has no field xyzzy: it has model, initial"),
        ({"schedule": {"warmup": 5}}, "section schedule has no field warmup: did you mean warmup_"),
        (
            {"model": {"model_dims": 64}},
            "section model has no field model_dims: did you mean model",
        ),
        ({"model": {"ffn_dims": [64]}}, "section model has no field ffn_dims"),
        ({"model": "OpenELM-9B"}, "model: name must be one of OpenELM-270M"),
        (
            {"model": {"head_dim": 3}},
            "model: model must have a model_name of .*, or lacks num_transformer",
        ),
        ({"model": 5}, "model must be a string or a mapping, got 5"),
        ({"batch": 5}, r"batch must be a mapping of fields, got 5 \(int\)"),
        ({"batch": {"micro": 1.5}}, r"batch.micro must be an integer, got 1.5 \(float\)"),
        ({"batch": {"micro": True}}, "batch.micro must be an integer, got True"),
        ({"batch": {"micro": None}}, "batch.micro must be an integer, got None"),
        ({"batch": {"micro": 0}}, "batch.micro must be 1 or more, got 0"),
        ({"batch": {"sequences": 7, "micro": 2}}, "batch.sequences must be a multiple of batch.mi"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas must be a list of 2 numbers, got \[0"),
        ({"optimizer": {"betas": [0.9, 1]}}, r"optimizer.betas must be two numbers in \[0, 1\)"),
        ({"optimizer": {"eps": 0}}, "optimizer.eps must be positive"),
        ({"optimizer": {"weight_decay": "much"}}, "optimizer.weight_decay must be a number"),
        ({"optimizer": {"grad_clip": float("nan")}}, "optimizer.grad_clip must be 0 or more"),
        ({"schedule": {"steps": 9, "warmup_steps": 10}}, "schedule.steps must be at least schedul"),
        ({"schedule": {"max_lr": 1e-5}}, "schedule.max_lr must be at least min_lr 0.00053"),
        ({"loss": {"label_smoothing": 1.0}}, r"loss.label_smoothing must be in \[0, 1\)"),
        ({"engine": {"precision": "fp8"}}, "engine.precision must be bf16 or fp32, got 'fp8'"),
        ({"engine": {"checkpoint_activations": [16]}}, r"engine.checkpoint_activations must be la"),
        ({"engine": {"checkpoint_activations": "all"}}, "must be true or false or a list of integ"),
        ({"on_nan": "ignore"}, "on_nan must be stop or skip"),
        ({"seed": -1}, "seed must be 0 or more"),
        (
            {"data": {"sequence_length": 8192}},
            "data.sequence_length must be at most the model's ro",
        ),
        ({"data": {"train": [5]}}, "data.train must be a list of strings"),
        ({"data": {"eos": -1}}, "data.eos must be 0 or more"),
        ({"model": {"model_name": "OpenELM-3B", "head_dim": 3}}, "model: head_dim must be even"),
        ([], "a recipe must be a mapping of fields"),
    ],
)
def test_errors_name_section_and_field(values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_mapping(values)


def test_errors_of_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nothing is neither a file nor one of OpenELM-1_1B"
    ):
        load("nothing")
    with pytest.raises(ValueError, match="a.yaml is not valid YAML"):
        load(write(tmp_path / "a.yaml", "a: [1"))
    with pytest.raises(ValueError, match="b.yaml: a recipe has no field sede: did you mean seed"):
        load(write(tmp_path / "b.yaml", "sede: 1"))
    with pytest.raises(TypeError, match="c.yaml: seed must be an integer"):
        load(write(tmp_path / "c.yaml", "seed: x"))
    with pytest.raises(ValueError, match="d.yaml: base must be another recipe"):
        load(write(tmp_path / "d.yaml", "base: d.yaml"))
    with pytest.raises(TypeError, match="e.yaml: base must be a recipe's name or file"):
        load(write(tmp_path / "e.yaml", "base: 5"))
    write(tmp_path / "f.yaml", "base: g.yaml")
    with pytest.raises(ValueError, match="base must be another recipe"):
        load(write(tmp_path / "g.yaml", "base: f.yaml"))
