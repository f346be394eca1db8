"""`elmkernels convert`: a checkpoint in another form of weights, as a folder or a GGUF file."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ..compression.packing import pack
from ..compression.quantization import quantize
from ..openelm.model import OpenELM
from ..weights.formats import BITS, GROUP_SIZES
from .console import DTYPES, OK, WrongInput, checked

# Spelled out: loading them needs no package, which other commands must not ask for.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_TOKENIZER = "tokenizer.model"
# What stands beside the weights of a folder and stays true of them.
_BESIDE = (
    _TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("convert", help="a checkpoint in another form of weights")
    parser.allow_abbrev = False
    add, absent = parser.add_argument, argparse.SUPPRESS
    add("--checkpoint", metavar="PATH", default=absent, help="a folder, or CoreNet's .pt")
    add("--config", metavar="YAML|NAME", default=absent, help="the shape of a CoreNet checkpoint")
    add("--to", choices=("quantized", "packed12", "gguf"), required=True, help="the form")
    add("--out", metavar="PATH", default=absent, help="the folder, or the GGUF file, to write")
    add("--dtype", choices=list(DTYPES), default=None, help="cast the weights to this first")
    add("--bits", type=int, choices=BITS, help="of quantized weights (default 4)")
    add("--group-size", type=int, choices=GROUP_SIZES, help="weights of a scale (default 64)")
    add("--type", choices=GGUF_TYPES, help="of a GGUF file's matrices (default f16)")
    add(
        "--tokenizer",
        metavar="FILE",
        help=f"{_TOKENIZER} to embed in a GGUF file (default: that "
        "beside the checkpoint, if there is one)",
    )
    add("--json", action="store_true", default=absent, help="print JSON on stdout")


def run(args: argparse.Namespace) -> int:
    for name in ("checkpoint", "out"):
        if getattr(args, name) is None:
            raise WrongInput(f"convert needs --{name}")
    for name, form in (
        ("bits", "quantized"),
        ("group_size", "quantized"),
        ("type", "gguf"),
        ("tokenizer", "gguf"),
    ):
        if getattr(args, name) is not None and args.to != form:
            raise WrongInput(f"--{name.replace('_', '-')} belongs to --to {form}, not {args.to}")
    source, out = Path(args.checkpoint), Path(args.out)
    if source.resolve() == out.resolve():
        raise WrongInput(f"--out must be another place than --checkpoint, both are {source}")
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    model = checked(lambda: OpenELM.from_pretrained(source, config=args.config, dtype=dtype))
    work = _to_gguf if args.to == "gguf" else _to_folder
    lines = checked(work, args, model, source, out)
    if args.json:
        print(json.dumps({"out": str(out), "to": args.to, "said": lines}, indent=1))
    else:
        print("\n".join([*lines, f"wrote {out}"]))
    return OK


def _to_folder(args: argparse.Namespace, model: OpenELM, source: Path, out: Path) -> list[str]:
    if args.to == "packed12":
        done = pack(model)
    else:
        done = quantize(model, args.bits or 4, args.group_size or 64)
    model.save_pretrained(out)
    for name in _BESIDE:
        if source.is_dir() and (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return str(done).splitlines()


def _to_gguf(args: argparse.Namespace, model: OpenELM, source: Path, out: Path) -> list[str]:
    from ..openelm.gguf import export_gguf

    beside = source / _TOKENIZER if source.is_dir() else source.with_name(_TOKENIZER)
    tokenizer = args.tokenizer or (beside if beside.is_file() else None)
    name = source.resolve().name if source.is_dir() else source.stem
    export_gguf(model, out, args.type or "f16", tokenizer=tokenizer, name=name)
    words = f"tokens of {tokenizer}" if tokenizer else f"no vocabulary ({beside} is not there)"
    return [f"{args.type or 'f16'}, {words}"]
