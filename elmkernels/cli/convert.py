"""`elmkernels convert`: a checkpoint in another form of weights, as a folder or a file."""

import argparse
from pathlib import Path
from typing import Any

from ..compression.packing import pack
from ..compression.plain import make_plain
from ..compression.quantization import quantize
from ..openelm.gguf import TYPES, export_gguf
from ..openelm.model import OpenELM
from ..weights.formats import BITS, GROUP_SIZES
from .console import OK, WrongInput, checked, dump
from .options import (
    DTYPES,
    add_checkpoint,
    add_config,
    add_dtype,
    add_json,
    checkpoint_of,
    new_command,
    one_of,
)

NAME = "convert"
_TOKENIZER = "tokenizer.model"
FORMS = ("plain", "quantized", "packed12", "gguf", "onnx")
# Options that one form alone has.
_BELONGS = {"bits": "quantized", "group_size": "quantized", "type": "gguf", "tokenizer": "gguf"}


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(commands, NAME, run, "a checkpoint in another form of weights")
    add = parser.add_argument
    add_checkpoint(parser, required=True)
    add_config(parser)
    add(
        "--to",
        type=one_of(FORMS),
        metavar="FORM",
        required=True,
        help=f"the form: {', '.join(FORMS)}",
    )
    add(
        "--out",
        metavar="PATH",
        required=True,
        help="the folder, or the GGUF or ONNX file, to write",
    )
    add_dtype(parser, None, "cast the weights first: fp32, bf16 or fp16 (default: as they are)")
    add("--bits", type=int, choices=BITS, help="of quantized weights (default 4)")
    add("--group-size", type=int, choices=GROUP_SIZES, help="weights of a scale (default 64)")
    add(
        "--type",
        type=one_of(TYPES),
        metavar="TYPE",
        help=f"of a GGUF file's matrices: {', '.join(TYPES)} (default f16)",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help=f"{_TOKENIZER} to embed in a GGUF file (default: the one beside the checkpoint)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    for name, form in _BELONGS.items():
        if getattr(args, name) is not None and args.to != form:
            raise WrongInput(f"--{name.replace('_', '-')} belongs to --to {form}, not {args.to}")
    source, out = checkpoint_of(args), Path(args.out)
    if source.resolve() == out.resolve():
        raise WrongInput(f"--out must be another place than --checkpoint, both are {source}")
    if args.tokenizer is not None and not checked(Path(args.tokenizer).is_file):
        raise WrongInput(f"--tokenizer: {args.tokenizer} is not a file")
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    # Compressed weights may have a dtype of their own: cast are those that they are made into.
    loaded = None if args.to == "plain" else dtype
    model = checked(lambda: OpenELM.from_pretrained(source, config=args.config, dtype=loaded))
    work = {"gguf": _to_gguf, "onnx": _to_onnx}.get(args.to, _to_folder)
    lines = checked(work, args, model, source, out)
    if args.json:
        print(dump({"out": out, "to": args.to, "report": lines}))
    else:
        print("\n".join([*lines, f"wrote {out}"]))
    return OK


def _to_folder(args: argparse.Namespace, model: OpenELM, _: Path, out: Path) -> list[str]:
    if args.to == "packed12":
        done = pack(model)
    elif args.to == "plain":
        done = make_plain(model)
        if args.dtype is not None:
            model.to(DTYPES[args.dtype])
    else:
        done = quantize(model, args.bits or 4, args.group_size or 64)
    model.save_pretrained(out)
    return str(done).splitlines()


def _to_gguf(args: argparse.Namespace, model: OpenELM, source: Path, out: Path) -> list[str]:
    beside = source / _TOKENIZER if source.is_dir() else source.with_name(_TOKENIZER)
    tokenizer = args.tokenizer or (beside if beside.is_file() else None)
    name = source.resolve().name if source.is_dir() else source.stem
    export_gguf(model, out, args.type or "f16", tokenizer=tokenizer, name=name)
    words = f"tokens of {tokenizer}" if tokenizer else f"no vocabulary ({beside} is not there)"
    return [f"{args.type or 'f16'}, {words}"]


def _to_onnx(args: argparse.Namespace, model: OpenELM, source: Path, out: Path) -> list[str]:
    from ..integrations.onnx import export_onnx

    export_onnx(model, out)
    return [
        f"inputs and outputs for each of {len(model.layers)} layers, weights in {out.name}.data"
    ]
