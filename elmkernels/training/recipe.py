"""A recipe: everything that one training run depends on, as a YAML file says it.

Sections and fields of the file are the dataclasses below and their fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Data:
    """Where tokens come from. Paths are files, folders or globs of text, .jsonl(.gz), .parquet and
    .bin (tokens already).
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    tokenizer: str = "bytes"  # or a tokenizer's file, or a checkpoint folder that holds one
    text_field: str = "text"  # of .jsonl and .parquet
    sequence_length: int = 2048
    separate_documents: bool = True  # attention, positions and loss end where a document does
    min_characters: int = 0  # shorter documents are left out
    min_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    sequences: int = 2048  # of all processes together, in one optimiser step
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
