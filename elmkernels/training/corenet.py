"""CoreNet's own pretraining configurations, read as recipes.

Every field of the file is either used, or named in a note of its own that says why it isn't.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .. import checks
from ..openelm.config import VARIANTS

_MARK = ("model", "language_modeling", "general_gpt")
_MODEL = ".".join(_MARK) + "."
# Where ours come from: section.field of CoreNet's file -> section.field of a recipe.
_TAKEN = {
    "common.grad_clip": "optimizer.grad_clip",
    "common.save_interval_freq": "keep.checkpoint_every",
    "common.log_freq": "keep.log_every",
    "common.eval_every_k_iterations": "keep.evaluate_every",
    "dataset.language_modeling.sequence_length": "data.sequence_length",
    "dataset.language_modeling.min_tokens_per_text": "data.min_tokens",
    "dataset.language_modeling.min_characters_per_text": "data.min_characters",
    "dataset.language_modeling.random_seed": "seed",
    "text_tokenizer.sentence_piece.model_path": "data.tokenizer",
    "loss.language_modeling.cross_entropy.label_smoothing": "loss.label_smoothing",
    "optim.weight_decay": "optimizer.weight_decay",
    "optim.adamw.eps": "optimizer.eps",
    "scheduler.max_iterations": "schedule.steps",
    "scheduler.warmup_iterations": "schedule.warmup_steps",
    "scheduler.warmup_init_lr": "schedule.warmup_init_lr",
    "scheduler.cosine.max_lr": "schedule.max_lr",
    "scheduler.cosine.min_lr": "schedule.min_lr",
    "model.activation_checkpointing": "engine.checkpoint_activations",
}
# Fields that must have one value, because nothing else is implemented.
_REQUIRED = {
    "dataset.category": "language_modeling",
    "dataset.name": "general_lm",
    "text_tokenizer.name": "sentence_piece",
    "loss.category": "language_modeling",
    "loss.language_modeling.name": "cross_entropy",
    "optim.name": "adamw",
    "optim.no_decay_bn_filter_bias": True,
    "optim.adamw.amsgrad": False,
    "scheduler.is_iteration_based": True,
    "scheduler.name": "cosine",
    "model.language_modeling.name": "general_gpt",
}
_COMBINED = {
    "optim.adamw.beta1": "optimizer.betas",
    "optim.adamw.beta2": "optimizer.betas",
    "common.mixed_precision": "engine.precision",
    "common.mixed_precision_dtype": "engine.precision",
    "fsdp.parameter_datatype": "engine.precision",
    "train_eval_pipeline.name": "engine.parallel",
    "dataset.train_batch_size0": "batch.micro and batch.sequences",
    "common.accum_freq": "batch.sequences",
    "loss.language_modeling.cross_entropy.use_z_loss": "loss.z_loss",
    "loss.language_modeling.cross_entropy.z_loss_eps": "loss.z_loss",
    "dataset.disable_val": "data.validation",
    "dataset.language_modeling.general_lm.train_data_info": "data.train and data.text_field",
    "dataset.language_modeling.general_lm.val_data_info": "data.validation and data.text_field",
}
# What CoreNet does where its file says nothing, and we would do something else.
_ABSENT = {
    "optimizer.grad_clip": 0.0,
    "optimizer.weight_decay": 4e-5,
    "schedule.warmup_steps": 0,
    "schedule.warmup_init_lr": 1e-7,
    "schedule.max_lr": 0.1,
    "schedule.min_lr": 1e-5,
}
_ANCHOR = "_anchor"  # fields that only hold a value for others to repeat
_IGNORED = "ignored"
_GPUS = 128  # that the paper trained on; the file says the batch of one
_TOKENIZER = "tokenizer.model"


def is_corenet(values: Any) -> bool:
    """Whether a parsed YAML is one of CoreNet's, by its sections."""
    for name in _MARK:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's mapping, and notes of what was ignored or assumed, one line each.

    Raises ValueError for a configuration that asks for something else than language-model
    pretraining with AdamW and a cosine.
    """
    flat = dict(_flatten(values))
    for name, wanted in _REQUIRED.items():
        if name in flat and flat[name] != wanted:
            checks.fail(name, repr(wanted), repr(flat[name]))
    made: dict[str, Any] = {}
    for ours, value in _ABSENT.items():
        _put(made, ours, value)
    for name, ours in _TAKEN.items():
        if flat.get(name) is not None:
            _put(made, ours, flat[name])
    if flat.get(_MODEL + "model_name") not in VARIANTS:
        name = _MODEL + "model_name"
        checks.fail(name, f"one of {', '.join(VARIANTS)}", repr(flat.get(name)))
    made["model"] = {
        name.removeprefix(_MODEL): value
        for name, value in flat.items()
        if name.startswith(_MODEL) and value is not None
    }
    _losses_and_betas(flat, made)
    _engine(flat, made)
    explained = explain(values)
    ignored = [name for name in explained if explained[name].startswith(_IGNORED)]
    notes = [f"{name}: {explained[name]}" for name in ignored]

    if "optim.no_decay_bn_filter_bias" not in flat:
        notes.append("optimizer.weight_decay: assumed to leave norms out (CoreNet decays them)")
    if "scheduler.max_iterations" not in flat:
        notes.append("schedule.steps: the file says none, set it")
    _batch(flat, made, notes)
    _data(flat, made, notes)
    return made, notes


def explain(values: Mapping[str, Any]) -> dict[str, str]:
    """For every field of CoreNet's file: what it is used as, or that it is ignored, and why."""
    explained = {}
    for name in dict(_flatten(values)):
        if name in _TAKEN:
            explained[name] = f"used as {_TAKEN[name]}"
        elif name in _COMBINED:
            explained[name] = f"used for {_COMBINED[name]}"
        elif name.startswith(_MODEL):
            explained[name] = f"used as model.{name.removeprefix(_MODEL)}"
        elif name in _REQUIRED:
            explained[name] = f"nothing but {_REQUIRED[name]!r} can be trained"
        elif name.startswith(_ANCHOR):
            explained[name] = "used where it is repeated"
        else:
            explained[name] = _IGNORED + _WHY.get(name, "")
    return explained


_WHY = {
    "taskname": " (a label)",
    "common.run_label": " (a label)",
    "common.auto_resume": " (a run resumes from its own folder)",
    "common.save_all_checkpoints": " (keep.checkpoints says how many stay)",
    "dataset.root_train": " (data.train says where the data is)",
    "dataset.workers": " (tokens are read from memory-mapped files)",
    "dataset.persistent_workers": " (tokens are read from memory-mapped files)",
    "dataset.pin_memory": " (tokens are read from memory-mapped files)",
    "dataset.language_modeling.shuffle_data": " (sequences are always shuffled)",
    **dict.fromkeys(
        (
            "fsdp.sharding_strategy",
            "fsdp.gradient_reduction_datatype",
            "fsdp.buffer_datatype",
            "fsdp.cpu_offload",
            "fsdp.limit_all_gathers",
        ),
        " (engine.parallel fsdp has settings of its own)",
    ),
    **dict.fromkeys(
        ("stats.val", "stats.train", "stats.checkpoint_metric", "stats.checkpoint_metric_max"),
        " (losses are always kept, and the newest checkpoints)",
    ),
    "loss.language_modeling.cross_entropy.ignore_index": " (nothing is padded, so nothing to skip)",
    "text_tokenizer.sentence_piece.append_sot_token": " (always, where the tokenizer has one)",
    "text_tokenizer.sentence_piece.append_eot_token": " (always)",
    "text_tokenizer.sentence_piece.enable_nfc_normalization": (
        " (texts are tokenized as they are: normalize them before)"
    ),
}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """a.b.c and value for every leaf; CoreNet's file may nest sections or write the dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _put(made: dict[str, Any], name: str, value: Any) -> None:
    section, _, field = name.rpartition(".")
    (made.setdefault(section, {}) if section else made)[field] = value


def _losses_and_betas(flat: Mapping[str, Any], made: dict[str, Any]) -> None:
    betas = [flat.get("optim.adamw.beta1", 0.9), flat.get("optim.adamw.beta2", 0.98)]
    _put(made, "optimizer.betas", betas)
    loss = "loss.language_modeling.cross_entropy."
    z_loss = flat.get(loss + "z_loss_eps", 1e-4) if flat.get(loss + "use_z_loss") else 0.0
    _put(made, "loss.z_loss", z_loss)


def _engine(flat: Mapping[str, Any], made: dict[str, Any]) -> None:
    dtype = "float32"
    if flat.get("common.mixed_precision"):
        dtype = flat.get("common.mixed_precision_dtype", "float16")
    if "fsdp" in str(flat.get("train_eval_pipeline.name")):
        _put(made, "engine.parallel", "fsdp")
        dtype = flat.get("fsdp.parameter_datatype", dtype)
    names = {"bfloat16": "bf16", "float32": "fp32"}
    if dtype not in names:
        checks.fail("common.mixed_precision_dtype", " or ".join(names), repr(dtype))
    _put(made, "engine.precision", names[dtype])


def _batch(flat: Mapping[str, Any], made: dict[str, Any], notes: list[str]) -> None:
    size = 1
    for name, absent in (("dataset.train_batch_size0", 128), ("common.accum_freq", 1)):
        value = flat.get(name, absent)
        if type(value) is not int:
            checks.fail(name, "an integer", repr(value), TypeError)
        size *= value
    _put(made, "batch.micro", flat.get("dataset.train_batch_size0", 128))
    _put(made, "batch.sequences", size * _GPUS)
    notes.append(
        f"batch.sequences: assumed {size * _GPUS}, {_GPUS} GPUs of {size} "
        "(the file says it for one GPU, the paper used so many)"
    )


def _data(flat: Mapping[str, Any], made: dict[str, Any], notes: list[str]) -> None:
    general = "dataset.language_modeling.general_lm."
    splits = {"train": "train_data_info"}
    if not flat.get("dataset.disable_val"):
        splits["validation"] = "val_data_info"
    keys = set()
    for split, name in splits.items():
        paths: list[str] = []
        for entry in flat.get(general + name) or []:
            if not isinstance(entry, Mapping):
                checks.fail(general + name, "a list of mappings", repr(entry))
            keys.add(entry.get("text_key", "text"))
            paths += _file_names(general + name, entry)
        _put(made, f"data.{split}", paths)
    if len(keys) > 1:
        checks.fail(f"{general}*.text_key", "the same everywhere", ", ".join(sorted(keys)))
    if keys:
        _put(made, "data.text_field", keys.pop())
    if not made["data"]["train"]:
        notes.append("data.train: the file names no data, set it")
    if "tokenizer" not in made["data"]:
        _put(made, "data.tokenizer", _TOKENIZER)
        notes.append(f"data.tokenizer: assumed {_TOKENIZER}, the file names none")
    if "min_characters" in made["data"]:
        notes.append(
            "data.min_characters: counted as the text is "
            "(CoreNet counts without punctuation and repeated spaces)"
        )
    notes.append(
        "data.separate_documents: assumed true, documents lie one after the other "
        "(CoreNet pads each to the sequence's length, or cuts it)"
    )


def _file_names(name: str, entry: Mapping[str, Any]) -> list[str]:
    template = entry.get("file_name")
    if template is None:
        return []
    first, last = entry.get("file_id_range", (0, 1))
    try:
        found = [template.format(file_id=number) for number in range(first, last)]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: file_name must be a path with {{file_id}}: {error}") from error
    return list(dict.fromkeys(found))
