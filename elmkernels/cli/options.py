"""Options that several commands have, each spelled and explained once, and what they mean."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..acceleration.swap import accelerate
from ..backends import BACKENDS, PREFERENCE, missing_kernels
from ..bench import end_to_end
from ..devices import backend_choices, missing_device, whole_model_backends
from ..generation.drafts import LOOKUP, SELF
from ..openelm.config import VARIANTS, variant_name
from ..openelm.model import OpenELM
from ..text.hub import local_path
from .console import WrongInput, checked, note

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_MODEL = "OpenELM-270M"
MODELS = ", ".join(VARIANTS)
SHAPES = MODELS.replace(", OpenELM", ", ")


class Parser(argparse.ArgumentParser):
    """Refuses by raising WrongInput, takes no abbreviations, and keeps its help narrow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {"allow_abbrev": False, "formatter_class": _Help} | kwargs
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise WrongInput(message)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def new_command(commands: Any, name: str, run: Callable, help: str, more: str = "") -> Parser:
    """A sub-command. help: its line in the list of commands, and with `more` what its own help
    begins with. run(args) carries it out and returns the exit code.
    """
    text = f"{help[0].upper()}{help[1:]}.{more and f' {more}'}"
    parser = commands.add_parser(name, help=help, description=text, add_help=False)
    # Who reads it has found it.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.usage = f"{parser.prog} [options]"
    parser.set_defaults(run=run, command=parser.prog.removeprefix("elmkernels "))
    return parser


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """A parser of one name."""
    names = list(known)

    def parse(text: str) -> str:
        if text.strip() not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}")
        return text.strip()

    return parse


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of one or more names, separated by commas."""
    parse_one = one_of(known)

    def parse(text: str) -> list[str]:
        found = [parse_one(name) for name in text.split(",") if name.strip()]
        return found or [parse_one(text)]

    return parse


def positive(text: str) -> int:
    """A parser of integers from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    """A parser of one or more integers from 1, separated by commas."""
    return [positive(one.strip()) for one in text.split(",")]


def add_json(to: Any) -> None:
    to.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")


def add_draft(to: Any) -> None:
    to.add_argument(
        "--draft",
        metavar="WHAT",
        help=f"what guesses tokens: {LOOKUP}, {SELF} or PATH",
    )
    to.add_argument(
        "--draft-tokens", type=positive, metavar="N", help="always guess N (default: what pays)"
    )


def chosen_draft(
    name: str | None, dtype: torch.dtype, device: torch.device
) -> str | OpenELM | None:
    """What --draft means, of models the model itself."""
    if name in (None, LOOKUP, SELF):
        return name
    try:
        path = checked(local_path, name)
        return checked(lambda: OpenELM.from_pretrained(path, dtype=dtype, device=device)).eval()
    except WrongInput as error:
        raise WrongInput(f"--draft must be {LOOKUP}, {SELF} or a checkpoint: {error}") from error


def add_device(to: Any) -> None:
    to.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")


def add_dtype(to: Any, default: str | None, use: str = "") -> None:
    to.add_argument(
        "--dtype",
        type=one_of(DTYPES),
        default=default,
        help=use or f"fp32, bf16 or fp16 (default {default})",
    )


def add_dtypes(to: Any, default: str, known: Iterable[str] = DTYPES) -> None:
    to.add_argument(
        "--dtype",
        type=some_of(known),
        action="extend",
        metavar="DTYPE[,...]",
        help=f"{', '.join(list(known)[:3])} (default: {default})",
    )


def add_backend(to: Any) -> None:
    """One for a whole model: others have kernels for some ops, which take them unasked."""
    names = whole_model_backends()
    to.add_argument(
        "--backend",
        type=one_of(names),
        metavar="NAME",
        help=f"{', '.join(names)} (default: best)",
    )


def add_backends(to: Any) -> None:
    to.add_argument(
        "--backend",
        type=some_of(BACKENDS),
        action="extend",
        metavar="NAME[,...]",
        help=f"{', '.join(BACKENDS)} (default: all)",
    )


def add_out(to: Any, files: str = "results.json and chart.png") -> None:
    to.add_argument("--out", metavar="DIR", help=f"write {files} there")


def add_quick(to: Any) -> None:
    to.add_argument("--quick", action="store_true", help="fewer, shorter measurements")


def add_rounds(to: Any, default: int) -> None:
    to.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"turns that each model takes (default {default})",
    )


def add_model(parser: Parser, default: str | None = None) -> None:
    """Which model: a checkpoint, or a shape with random weights; one must be given without a
    default.
    """
    group = parser.add_argument_group("model")
    either = group.add_mutually_exclusive_group(required=default is None)
    add_checkpoint(either)
    add_variant(either, default)
    add_config(group)


def add_checkpoint(to: Any, **more: Any) -> None:
    to.add_argument(
        "--checkpoint", metavar="PATH", help="a Hugging Face folder, or CoreNet's .pt", **more
    )


def add_config(to: Any) -> None:
    to.add_argument("--config", metavar="YAML|NAME", help="the shape of a CoreNet checkpoint")


def add_variant(to: Any, default: str | None) -> None:
    also = "" if default is None else f" (default: {default})"
    to.add_argument(
        "--model", type=variant, metavar="NAME", help=f"{SHAPES}, with random weights{also}"
    )


def variant(text: str) -> str:
    """The full name of a model's shape."""
    name = variant_name(text)
    if name is None:
        raise argparse.ArgumentTypeError(f"must be one of {MODELS}, got {text!r}")
    return name


def find_device(text: str | None) -> torch.device:
    """A device that is here, by name."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in PREFERENCE:
        raise WrongInput(f"--device must be {' or '.join(PREFERENCE)}, got {text!r}")
    if reason := missing_device(device):
        raise WrongInput(reason)
    return device


def check_backend(name: str | None, device: torch.device) -> None:
    """Refuse a backend that can't run a model on this device."""
    checked(backend_choices, device, name)


def dtypes_of(args: argparse.Namespace, default: tuple[str, ...]) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys(DTYPES[name] for name in args.dtype or default))


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The checkpoint that is meant, if it looks like one; `load` reads it. A name of the Hub
    becomes its folder in the arguments too.
    """
    try:
        path = checked(local_path, args.checkpoint)
    except WrongInput as error:
        raise WrongInput(f"--checkpoint: {error}") from error
    args.checkpoint = str(path)
    what = f"--checkpoint: {path}"
    if path.is_dir():
        if args.config is not None:
            raise WrongInput(f"--config describes a single file; {path} has a config.json")
    elif path.suffix == ".gguf":
        raise WrongInput(
            f"{what} is a GGUF file, which is written (convert --to gguf) but not read: give the "
            "folder or the .pt that it was made from"
        )
    elif args.config is None:
        folder = path.resolve().parent
        if (folder / "config.json").is_file():
            raise WrongInput(f"{what} is a file: give the folder that holds it, {folder}")
        raise WrongInput(
            f"{what} is a file: give a Hugging Face folder (with its config.json), or the shape "
            "of a CoreNet checkpoint as --config YAML|NAME"
        )
    return path


def loaded_first(
    load: Callable[[torch.dtype], OpenELM], dtype: torch.dtype
) -> Callable[[torch.dtype], OpenELM]:
    """The same `load`, called for one dtype here already: what is wrong with a checkpoint is found
    before anything is written or measured.
    """
    loaded = {dtype: checked(load, dtype)}

    def take(dtype: torch.dtype) -> OpenELM:
        return loaded.pop(dtype) if dtype in loaded else checked(load, dtype)

    return take


def add_activations(to: Any) -> None:
    to.add_argument(
        "--activations",
        type=one_of(("int8",)),
        metavar="int8",
        help="for 8 and 4 bits: less exact",
    )


def accelerated(model: OpenELM, backend: str | None, activations: str | None = None) -> None:
    """Accelerate a model; that nothing compiled can run is said, since it is slow then."""
    report = checked(lambda: accelerate(model, backend=backend, activations=activations))
    if report.missing:
        note(report.missing)


def note_missing(device: torch.device, backend: str | None) -> None:
    """The same, for measurements that show no report of an accelerated model."""
    if backend is None and (reason := missing_kernels(device.type)):
        note(reason)


def chosen_model(
    args: argparse.Namespace, device: torch.device, seed: int
) -> tuple[str, str, Callable[[torch.dtype], OpenELM]]:
    """The model's name, where its weights come from, and how to get it in a dtype."""
    if args.checkpoint is None:
        if args.config is not None:
            raise WrongInput("--config describes a --checkpoint, which is missing")
        name = args.model or DEFAULT_MODEL
        load = end_to_end.weights_of(None, None, name, seed, device)
        return name, f"random weights of seed {seed}", load
    given = Path(args.checkpoint)
    path = checkpoint_of(args)
    load = end_to_end.weights_of(path, args.config, "", seed, device)
    name = path.resolve().stem if path.is_file() else path.resolve().name
    return name if given.exists() else given.name, f"from {path}", load
