"""Which model a command line means: a checkpoint, or a shape with random weights."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from ..bench import end_to_end
from ..openelm.config import VARIANTS
from ..openelm.model import OpenELM
from .console import WrongInput


def chosen_model(
    args: argparse.Namespace, device: torch.device, seed: int, default: str | None = None
) -> tuple[str, str, Callable[[torch.dtype], OpenELM]]:
    """The model's name, where its weights come from, and how to get it in a dtype. default: the
    shape where neither --checkpoint nor --model is given; None where one must be.
    """
    if args.checkpoint is None:
        if args.config is not None:
            raise WrongInput("--config describes a --checkpoint, which is missing")
        name = variant(args.model, default)
        load = end_to_end.weights_of(None, None, name, seed, device)
        return name, f"random weights of seed {seed}", load
    if args.model is not None:
        raise WrongInput("--model draws random weights: give it or --checkpoint, not both")
    path = Path(args.checkpoint)
    load = end_to_end.weights_of(path, args.config, "", seed, device)
    return path.resolve().stem if path.is_file() else path.resolve().name, f"from {path}", load


def variant(given: str | None, default: str | None = None) -> str:
    """The full name of a model's shape, as VARIANTS has it."""
    chosen = given or default
    if chosen is None:
        raise WrongInput("a model is missing: --checkpoint DIR, or --model for random weights")
    name = "OpenELM-" + chosen.upper().removeprefix("OPENELM-").replace(".", "_")
    if name not in VARIANTS:
        raise WrongInput(f"--model must be one of {', '.join(VARIANTS)}, got {given!r}")
    return name
