"""A recipe: everything that one training run depends on, as a YAML file says it.

Sections and fields of the file are the dataclasses below and their fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import checks
from ..openelm.checkpoint import read_config
from ..openelm.config import VARIANTS, OpenELMConfig
from ..weights.texts import read_yaml
from . import corenet, routines, schema

# Without these a model would be of no shape that anybody asked for.
_SHAPE = ("num_transformer_layers", "model_dim", "head_dim")
READY = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Data:
    """Where tokens come from. Paths are files, folders or globs of text, .jsonl(.gz), .parquet and
    .bin (tokens already), seen from the current folder; `stdlib` is Python's own library.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    tokenizer: str = "bytes"  # or a tokenizer's file, or a checkpoint folder that holds one
    eos: int | None = None  # the id that ends a document; None: the tokenizer's
    text_field: str = "text"  # of .jsonl and .parquet
    sequence_length: int = 2048
    separate_documents: bool = True  # attention, positions and loss end where a document does
    min_characters: int = 0  # shorter documents are left out
    min_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    sequences: int = 2048  # of all processes together, in one optimizer step
    micro: int = 1  # sequences that a process holds at once; the rest is accumulated


@dataclass(frozen=True)
class Optimizer:
    """AdamW; matrices and embeddings decay, norms don't."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # 0: none


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine down to min_lr at the last step."""

    steps: int = 350_000
    max_lr: float = 5.3e-3
    min_lr: float = 5.3e-4
    warmup_steps: int = 5_000
    warmup_init_lr: float = 1e-6


@dataclass(frozen=True)
class Loss:
    z_loss: float = 1e-4
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Engine:
    """How it is run: none of these changes what is computed, beyond rounding."""

    precision: str = "bf16"  # bf16: autocast with float32 masters; fp32
    kernels: bool | str = True  # accelerate the model; a string names the backend
    checkpoint_activations: bool | tuple[int, ...] = False  # all layers, or these
    parallel: str = "ddp"  # beyond one process: ddp or fsdp
    plan: str | Mapping[str, Any] | None = None  # of the products on a CPU (see `routines`)


@dataclass(frozen=True)
class Keep:
    """What is written, in steps; 0: never."""

    checkpoint_every: int = 5_000
    checkpoints: int = 5  # the newest stay
    average: int = 5  # of them make the averaged model at the end
    log_every: int = 10
    evaluate_every: int = 1_000
    evaluate_sequences: int = 256
    tensorboard: bool = False


@dataclass(frozen=True)
class Recipe:
    model: str | Mapping[str, Any] = "OpenELM-270M"  # a name, or OpenELMConfig's fields
    initial: str | None = None  # a checkpoint to start from instead of random weights
    seed: int = 0
    on_nan: str = "stop"  # or skip: leave that update out
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    engine: Engine = field(default_factory=Engine)
    keep: Keep = field(default_factory=Keep)


def ready() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in READY.glob("*.yaml")))


def load(source: str | Path) -> tuple[Recipe, list[str]]:
    """A recipe by the name of a ready one, from our YAML or from one of CoreNet's; and, one line
    each, what of the file was ignored or had to be assumed.

    A file of ours may name another recipe as `base`, whose fields it replaces.
    Raises FileNotFoundError, ImportError without PyYAML, and ValueError or TypeError naming the
    section and field.
    """
    return _load(source, ())


def _load(source: str | Path, above: tuple[Path, ...]) -> tuple[Recipe, list[str]]:
    """above: the files that this one is the base of."""
    path = _find(source)
    if path.resolve() in above:
        checks.fail("base", "another recipe", path)
    values = read_yaml(path)
    says_model = isinstance(values, Mapping) and "model" in values
    try:
        if corenet.is_corenet(values):
            values, notes = corenet.translate(values)
        else:
            values, notes = _with_base(values, path, (*above, path.resolve()))
        recipe = from_mapping(values)
    except (ValueError, TypeError) as error:
        raise _kind(error)(f"{path}: {error}") from error
    if says_model and recipe.initial is not None and Path(recipe.initial).is_dir():
        notes.append(f"model: ignored, {recipe.initial} says it")
    return recipe, notes


def _kind(error: Exception) -> type[Exception]:
    """What to raise again: subclasses may not be made from a message alone."""
    return TypeError if isinstance(error, TypeError) else ValueError


def _find(source: str | Path) -> Path:
    if str(source) in ready():
        return READY / f"{source}.yaml"
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a file nor one of {', '.join(ready())}")
    return path


def _with_base(values: Any, path: Path, above: tuple[Path, ...]) -> tuple[Any, list[str]]:
    if not isinstance(values, Mapping) or "base" not in values:
        return values, []
    base = values["base"]
    if not isinstance(base, str):
        checks.fail("base", "a recipe's name or file", repr(base), TypeError)
    beside = path.parent / base
    found = beside if beside.is_file() and base not in ready() else base
    recipe, notes = _load(found, above)
    return merge(to_mapping(recipe), {k: v for k, v in values.items() if k != "base"}), notes


def merge(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with fields replaced; a model is replaced as a whole."""
    merged = dict(values)
    for name, value in over.items():
        section = merged.get(name)
        if isinstance(section, Mapping) and name != "model":
            if value is None:  # a section whose lines are all comments
                continue
            value = {**section, **value} if isinstance(value, Mapping) else value
        merged[name] = value
    return merged


def from_mapping(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a parsed YAML or JSON says, validated. What it leaves out has the defaults.

    Raises ValueError or TypeError naming section and field.
    """
    recipe = schema.build(Recipe, values)
    validate(recipe)
    return recipe


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Plain values that YAML and JSON can say, and `from_mapping` reads back."""
    return schema.plain(recipe)


def model_config(recipe: Recipe) -> OpenELMConfig:
    """The model's shape: that of `initial` where it is a folder, else what `model` says.

    A mapping whose model_name is one of VARIANTS is that model with the other fields replaced.
    Raises ValueError, TypeError or FileNotFoundError.
    """
    if recipe.initial is not None and not Path(recipe.initial).exists():
        raise FileNotFoundError(f"initial: {recipe.initial} does not exist")
    if recipe.initial is not None and Path(recipe.initial).is_dir():
        return read_config(recipe.initial)
    if isinstance(recipe.model, str):
        return OpenELMConfig.from_name(recipe.model)
    values = dict(recipe.model)
    schema.known(
        "model", values, [n for n in OpenELMConfig.__dataclass_fields__ if n != "ffn_dims"]
    )
    if values.get("model_name") in VARIANTS:
        return OpenELMConfig.from_name(values.pop("model_name"), **values)
    missing = [name for name in _SHAPE if name not in values]
    if missing:
        raise ValueError(
            f"model must have a model_name of {', '.join(VARIANTS)}, or lacks {', '.join(missing)}"
        )
    return OpenELMConfig(**values)


def validate(recipe: Recipe) -> None:
    """Raises ValueError naming section and field where values are out of range or don't go
    together. The files that it names needn't exist.
    """
    schema.validate(recipe)
    routines.named(recipe.engine.plan)
    if recipe.initial is not None and not Path(recipe.initial).exists():
        return
    try:
        config = model_config(recipe)
    except (ValueError, TypeError) as error:
        raise _kind(error)(f"model: {error}") from error
    fit(recipe, config)


def fit(recipe: Recipe, config: OpenELMConfig) -> None:
    """Raises ValueError where sequences or layers that the recipe names don't fit a model."""
    if recipe.data.sequence_length > config.rope_max_length:
        checks.fail(
            "data.sequence_length",
            f"at most the model's rope_max_length {config.rope_max_length}",
            recipe.data.sequence_length,
        )
    layers = recipe.engine.checkpoint_activations
    if isinstance(layers, tuple) and not all(
        0 <= layer < config.num_transformer_layers for layer in layers
    ):
        expected = f"layers in [0, {config.num_transformer_layers})"
        checks.fail("engine.checkpoint_activations", expected, list(layers))
