"""CoreNet's own configurations, imitated: what is taken, and a word on everything else."""

import re

import pytest
import yaml

from elmkernels.training import corenet
from elmkernels.training.recipe import load, model_config

CONFIG = """
taskname: a label
_anchor_length: &length 512
_anchor_padding: &padding 31999
_anchor_dtype: &dtype "bfloat16"
common:
  grad_clip: 0.5
  log_freq: 7
  auto_resume: true
  save_interval_freq: 400
  eval_every_k_iterations: 80
  mixed_precision: true
  mixed_precision_dtype: *dtype
  accum_freq: 2
dataset:
  train_batch_size0: 4
  workers: 3
  category: language_modeling
  name: general_lm
  language_modeling:
    sequence_length: *length
    min_tokens_per_text: 11
    min_characters_per_text: 22
    general_lm:
      train_data_info: [
        {"file_name": "/corpus/part-{file_id:03d}.parquet", "text_key": "body",
         "file_id_range": [0, 3]},
        {"file_name": "/corpus/more.jsonl", "text_key": "body", "file_id_range": [0, 1]},
      ]
      val_data_info: [{"file_name": "/corpus/held.jsonl", "text_key": "body",
                       "file_id_range": [0, 1]}]
text_tokenizer:
  name: sentence_piece
  sentence_piece:
    model_path: /llama/tokenizer.model
    append_eot_token: true
loss:
  category: language_modeling
  language_modeling:
    name: cross_entropy
    cross_entropy:
      ignore_index: *padding
      use_z_loss: true
      z_loss_eps: 3.e-4
      label_smoothing: 0.1
optim:
  name: adamw
  weight_decay: 0.2
  no_decay_bn_filter_bias: true
  adamw: {beta1: 0.8, beta2: 0.9, eps: 1.e-7}
scheduler:
  name: cosine
  is_iteration_based: true
  max_iterations: 3000
  warmup_init_lr: 1.e-05
  warmup_iterations: 300
  cosine: {max_lr: 0.01, min_lr: 0.001}
model:
  activation_checkpointing: true
  language_modeling:
    name: general_gpt
    general_gpt:
      model_name: OpenELM-450M
      vocab_size: 32000
      max_context_length: *length
      padding_index: *padding
"""


def without(*names: str, **changes) -> dict:
    """CONFIG's values, without some (a.b.c) and with others changed (a__b__c)."""
    values = yaml.safe_load(CONFIG)
    for name in names:
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section[part]
        del section[last]
    for name, value in changes.items():
        *path, last = name.split("__")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def read(tmp_path, values):
    path = tmp_path / "corenet.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return load(path)


def test_every_field_that_we_have_is_taken(tmp_path):
    recipe, _ = read(tmp_path, CONFIG)
    data, schedule = recipe.data, recipe.schedule
    assert data.train == (
        "/corpus/part-000.parquet",
        "/corpus/part-001.parquet",
        "/corpus/part-002.parquet",
        "/corpus/more.jsonl",
    )
    assert data.validation == ("/corpus/held.jsonl",)
    assert (data.text_field, data.tokenizer) == ("body", "/llama/tokenizer.model")
    assert (data.sequence_length, data.min_tokens, data.min_characters) == (512, 11, 22)
    assert (recipe.batch.micro, recipe.batch.sequences) == (4, 4 * 2 * 128)
    assert recipe.optimizer.betas == (0.8, 0.9) and recipe.optimizer.eps == 1e-7
    assert (recipe.optimizer.weight_decay, recipe.optimizer.grad_clip) == (0.2, 0.5)
    assert (schedule.steps, schedule.warmup_steps, schedule.warmup_init_lr) == (3000, 300, 1e-5)
    assert (schedule.max_lr, schedule.min_lr) == (0.01, 0.001)
    assert (recipe.loss.z_loss, recipe.loss.label_smoothing) == (3e-4, 0.1)
    assert recipe.engine.precision == "bf16" and recipe.engine.parallel == "ddp"
    assert recipe.engine.checkpoint_activations is True
    keep = recipe.keep
    assert (keep.checkpoint_every, keep.log_every, keep.evaluate_every) == (400, 7, 80)
    config = model_config(recipe)
    assert config.model_name == "OpenELM-450M" and config.num_transformer_layers == 20
    assert (config.vocab_size, config.max_context_length, config.padding_index) == (
        32000,
        512,
        31999,
    )


def leaves(line: str) -> int:
    """How many fields a line of CONFIG sets (data files are a list: one)."""
    if "{" not in line or "data_info" in line:
        return int(re.match(r" *\w+: *\S", line) is not None)
    return 0 if "file_name" in line else line.count(": ") - 1


def test_every_field_is_explained_and_what_isn_t_used_is_noted(tmp_path):
    _, notes = read(tmp_path, CONFIG)
    said = corenet.explain(yaml.safe_load(CONFIG))
    # Every line of the file that sets something.
    assert len(said) == sum(map(leaves, CONFIG.splitlines()))
    ignored = {name for name, word in said.items() if word.startswith("ignored")}
    assert ignored == {
        "taskname",
        "common.auto_resume",
        "dataset.workers",
        "text_tokenizer.sentence_piece.append_eot_token",
        "loss.language_modeling.cross_entropy.ignore_index",
    }
    assert {note.partition(":")[0] for note in notes} == ignored | {
        "batch.sequences",
        "data.separate_documents",
        "data.min_characters",
    }
    assert all("\n" not in note for note in notes)
    assert said["scheduler.cosine.max_lr"] == "used as schedule.max_lr"


def test_unknown_fields_are_noted(tmp_path):
    _, notes = read(tmp_path, without(ema__enable=True))
    assert "ema.enable: ignored" in notes


def test_fully_sharded_training(tmp_path):
    values = without(
        "common.mixed_precision",
        "common.mixed_precision_dtype",
        train_eval_pipeline__name="fsdp_train_eval_pipeline",
        fsdp__parameter_datatype="bfloat16",
    )
    recipe, _ = read(tmp_path, values)
    assert (recipe.engine.parallel, recipe.engine.precision) == ("fsdp", "bf16")


def test_what_the_file_leaves_out_is_as_in_corenet(tmp_path):
    cross_entropy = "loss.language_modeling.cross_entropy."
    values = without(
        "common",
        "optim.weight_decay",
        "optim.no_decay_bn_filter_bias",
        "optim.adamw",
        "scheduler.max_iterations",
        "scheduler.warmup_init_lr",
        "scheduler.warmup_iterations",
        "scheduler.cosine",
        "dataset.language_modeling.general_lm",
        "text_tokenizer.sentence_piece.model_path",
        cross_entropy + "use_z_loss",
        dataset__disable_val=True,
    )
    recipe, notes = read(tmp_path, values)
    assert recipe.engine.precision == "fp32" and recipe.loss.z_loss == 0
    assert recipe.optimizer.grad_clip == 0 and recipe.optimizer.weight_decay == 4e-5
    assert recipe.optimizer.betas == (0.9, 0.98)
    schedule = recipe.schedule
    assert (schedule.warmup_steps, schedule.warmup_init_lr) == (0, 1e-7)
    assert (schedule.max_lr, schedule.min_lr) == (0.1, 1e-5)
    assert recipe.data.train == recipe.data.validation == ()
    named = {note.partition(":")[0] for note in notes}
    wanted = {"data.train", "data.tokenizer", "schedule.steps", "optimizer.weight_decay"}
    assert wanted <= named


def test_validation_that_is_disabled_is_left_out(tmp_path):
    assert read(tmp_path, without(dataset__disable_val=True))[0].data.validation == ()


KEYS = [{"file_name": "a", "text_key": "x"}, {"file_name": "b", "text_key": "y"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__name": "sgd"}, "optim.name must be 'adamw', got 'sgd'"),
        ({"scheduler__name": "polynomial"}, "scheduler.name must be 'cosine', got 'polynomial'"),
        ({"dataset__name": "commonsense_170k"}, "dataset.name must be 'general_lm'"),
        ({"optim__no_decay_bn_filter_bias": False}, "optim.no_decay_bn_filter_bias must be True"),
        ({"common__mixed_precision_dtype": "float16"}, "mixed_precision_dtype must be bfloat16 or"),
        ({"scheduler__max_iterations": "long"}, "schedule.steps must be an integer, got 'long'"),
        ({"dataset__train_batch_size0": "x"}, "dataset.train_batch_size0 must be an integer"),
        ({"dataset__language_modeling__general_lm__train_data_info": KEYS}, "must be the same ev"),
        (
            {
                "dataset__language_modeling__general_lm__train_data_info": [
                    {"file_name": "{x}", "text_key": "body", "file_id_range": [0, 1]}
                ]
            },
            "train_data_info: file_name must be a path with {file_id}",
        ),
        (
            {"dataset__language_modeling__general_lm__train_data_info": ["a"]},
            "train_data_info must be a list of mappings",
        ),
        (
            {"model__language_modeling__general_gpt__model_name": "x"},
            "general_gpt.model_name must be one of",
        ),
        ({"dataset__language_modeling__sequence_length": 5000}, "rope_max_length"),
    ],
)
def test_errors_name_corenet_s_field(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read(tmp_path, without(**changes))
