"""elmkernels generate: what a model writes after a prompt, as text or as ids.

Results go to stdout, everything said about them (speed, an interruption) to stderr.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

from .. import interrupts
from ..acceleration.decode_modes import CALLS, DECODE_MODES
from ..compression.packing import pack
from ..compression.quantization import quantize
from ..generation.chat import Chat, Template
from ..generation.row import Row
from ..generation.sampling import Sampling
from ..generation.session import stream
from ..generation.streaming import Stream
from ..openelm.model import OpenELM
from ..openelm.tokenizer import FILES, Tokenizer, find_tokenizer, special_tokens
from ..weights.formats import BITS, GROUP_SIZES
from .console import (
    OK,
    Progress,
    WrongInput,
    checked,
    dump,
    note,
    words,
)
from .options import (
    DTYPES,
    accelerated,
    add_activations,
    add_backend,
    add_device,
    add_draft,
    add_dtype,
    add_json,
    add_model,
    check_backend,
    chosen_draft,
    chosen_model,
    find_device,
    new_command,
    one_of,
    positive,
)

NAME = "generate"
MAX_NEW_TOKENS = 64


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = new_command(commands, NAME, run, "what a model writes after a prompt")
    add_model(parser)
    _add_prompts(parser.add_argument_group("prompt (several make a batch)"))
    add = parser.add_argument_group("choice of tokens").add_argument
    add(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        default=MAX_NEW_TOKENS,
        help=f"(default {MAX_NEW_TOKENS})",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        default=0.0,
        help="(default 0: the likeliest token)",
    )
    add("--top-k", type=int, metavar="K", help="draw from the k likeliest tokens")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest that sum to this probability",
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="R",
        default=1.0,
        help="above 1: less of what was there",
    )
    add("--seed", type=int, metavar="N", help="of what is drawn, and of random weights")
    add("--stop", metavar="IDS|none", help="ids that end a row (default: eos_token_id)")
    add(
        "--stop-string",
        action="append",
        metavar="TEXT",
        default=[],
        help="text that ends a row; may be given again",
    )
    how = parser.add_argument_group("how it runs and prints")
    add_device(how)
    add_dtype(how, "bf16")
    kernels = how.add_mutually_exclusive_group()
    add_backend(kernels)
    kernels.add_argument("--eager", action="store_true", help="the reference, without kernels")
    form = how.add_mutually_exclusive_group()
    form.add_argument("--bits", type=int, choices=BITS, help="quantize the projections")
    form.add_argument("--packed12", action="store_true", help="bfloat16 in 12 bits, without loss")
    add = how.add_argument
    add("--group-size", type=int, choices=GROUP_SIZES, help="columns that share a scale, by --bits")
    add_activations(how)
    add(
        "--decode-mode",
        type=one_of(DECODE_MODES),
        metavar="MODE",
        help=f"GPU: {', '.join(DECODE_MODES)} (default: fastest)",
    )
    add_draft(how)
    results = how.add_mutually_exclusive_group()
    results.add_argument("--stream", action="store_true", help="print it as it comes (one prompt)")
    add_json(results)


def _add_prompts(group: Any) -> None:
    """Both kinds of prompt, in the order in which they were given."""
    add = group.add_argument
    prompts: dict[str, Any] = {"action": "append", "dest": "prompts"}
    add("--prompt", metavar="TEXT", type=lambda text: ("text", text), help="as text", **prompts)
    add(
        "--ids",
        metavar="1,2,3|FILE",
        type=lambda text: ("ids", text),
        help="as token ids; of a file each line is a prompt",
        **prompts,
    )
    add("--chat", action="store_true", help="take turns from stdin, until it ends (Ctrl-D)")
    add("--tokenizer", metavar="PATH", help="its file (default: beside the checkpoint)")


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns its exit code."""
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
    }
    drawing = {"top_k": None, "top_p": None}  # what has no effect is refused as an option is named
    _refuse_what_does_nothing(args, checked(lambda: Sampling(**options | drawing)))
    checked(lambda: Sampling(**options))
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    check_backend(args.backend, device)
    name, weights, load = chosen_model(args, device, args.seed or 0)
    bos, _ = checked(special_tokens, args.checkpoint)
    tokenizer = _tokenizer(args, bos)
    prompts = [ids for kind, text in args.prompts or () for ids in _prompt(kind, text, tokenizer)]
    if args.stream and len(prompts) > 1:
        raise WrongInput(f"--stream takes one prompt, got {len(prompts)}")
    stops = None if args.stop is None else [] if args.stop == "none" else _ids(args.stop, "--stop")
    model = checked(load, dtype).eval()
    checked(_compress, args, model)
    if not args.eager:
        accelerated(model, args.backend, args.activations)
    options |= {"stop_tokens": stops, "stop_strings": args.stop_string}
    options |= {"decode_mode": args.decode_mode, "draft_tokens": args.draft_tokens}
    options["draft"] = draft = chosen_draft(args.draft, dtype, device)
    if isinstance(draft, OpenELM) and not args.eager:
        accelerated(draft, args.backend)
    if args.chat:
        return _chat(args, model, tokenizer, options)
    writing = checked(
        lambda: stream(model, prompts, args.max_new_tokens, tokenizer=tokenizer, **options)
    )
    live = _Live() if args.stream else None
    seconds = _write(writing, live, args.max_new_tokens)
    found = _results(writing, prompts, seconds)
    if args.json:
        about = {"model": name, "weights": weights, "dtype": str(dtype).removeprefix("torch.")}
        print(dump(about | {"device": device} | found))
    elif live is None:
        _print(found["rows"])
    note(_summary(found))
    if writing.interrupted:
        note("interrupted; what was generated by then is printed")
        return interrupts.exit_code()
    return OK


def _refuse_what_does_nothing(args: argparse.Namespace, sampling: Sampling) -> None:
    """Options that belong to others which weren't given."""
    if args.chat:
        others = {"--prompt or --ids": args.prompts, "--json": args.json, "--stream": args.stream}
        if idle := [option for option, value in others.items() if value]:
            raise WrongInput(f"--chat takes its turns from stdin: give it without {idle[0]}")
    elif not args.prompts:
        raise WrongInput("a prompt is missing: --prompt TEXT or --ids 1,2,3, or --chat")
    if args.activations is not None and args.eager:
        raise WrongInput("--activations has no effect with --eager, which rounds nothing")
    if args.draft_tokens is not None and args.draft is None:
        raise WrongInput("--draft-tokens belongs to --draft, which is missing")
    if args.group_size is not None and args.bits is None:
        raise WrongInput("--group-size belongs to --bits, which is missing")
    if sampling.temperature == 0:
        drawing = {"--top-k": args.top_k, "--top-p": args.top_p}
        if args.model is None:  # whose weights the seed is of, else
            drawing["--seed"] = args.seed
        idle = [option for option, value in drawing.items() if value is not None]
        if idle:
            raise WrongInput(
                f"{idle[0]} has no effect at temperature 0, which takes the likeliest token: "
                "give --temperature too"
            )


def _compress(args: argparse.Namespace, model: OpenELM) -> None:
    """What --bits or --packed12 does to a model."""
    if args.bits is not None:
        quantize(model, args.bits, args.group_size or 64)
    elif args.packed12:
        pack(model)


def _tokenizer(args: argparse.Namespace, bos: int | None) -> Tokenizer | None:
    """The tokenizer that is there. Without one, ids still work."""
    path = checked(find_tokenizer, args.tokenizer, args.checkpoint)
    if path is None:
        text = "--chat" if args.chat else "--prompt" if _any(args, "text") else ""
        if text or args.stop_string:
            raise WrongInput(
                f"{text or '--stop-string'} needs a tokenizer: --tokenizer PATH, "
                f"or {' or '.join(FILES)} beside the checkpoint (OpenELM uses Llama 2's, which "
                "meta-llama/Llama-2-7b-hf holds); --ids works without"
            )
        return None
    try:
        return Tokenizer(path, bos)
    except ImportError as error:
        ids = not args.chat and not _any(args, "text")
        if args.tokenizer is None and ids and not args.stop_string:
            return None
        raise WrongInput(str(error)) from error
    except (ValueError, OSError) as error:
        raise WrongInput(words(error)) from error


def _any(args: argparse.Namespace, kind: str) -> bool:
    return any(given == kind for given, _ in args.prompts or ())


def _chat(
    args: argparse.Namespace, model: OpenELM, tokenizer: Tokenizer, options: dict[str, Any]
) -> int:
    """Turns from stdin, a line each, and replies on stdout as they come."""
    template = checked(Template.of, args.checkpoint)
    chat = checked(
        lambda: Chat(model, tokenizer, template, max_new_tokens=args.max_new_tokens, **options)
    )
    if sys.stdin is None:
        raise WrongInput("--chat needs a stdin to take turns from")
    live = sys.stdin.isatty()
    while True:
        if live:
            print("> ", end="", file=sys.stderr, flush=True)
        line = checked(sys.stdin.readline)  # which may hold what is no text
        if not line:
            break
        if not line.strip():
            continue
        before = chat.forgotten
        try:
            writing = chat.say(line.strip())
        except ValueError as error:
            note(f"error: {error}")
            continue
        if chat.forgotten > before:
            note("the oldest turns are forgotten: the conversation no longer fits")
        _write(writing, _Live(), args.max_new_tokens)  # Ctrl-C ends the reply, not the chat
    if live:
        print(file=sys.stderr)
    return OK


def _prompt(kind: str, text: str, tokenizer: Tokenizer | None) -> list[list[int]]:
    if kind == "text" and tokenizer is not None:
        if not text:
            raise WrongInput("--prompt must hold text, got an empty string")
        return [checked(tokenizer.encode, text)]
    if re.fullmatch(r"[-\d\s,]*", text):
        return [_ids(text, "--ids")]
    if not checked(Path(text).is_file):
        raise WrongInput(f"--ids must be numbers like 1,2,3 or a file of them, got {text!r}")
    lines = checked(lambda: Path(text).read_text(encoding="utf-8")).splitlines()
    rows = [_ids(line, f"--ids: {text}") for line in lines if line.strip()]
    if not rows:
        raise WrongInput(f"--ids: {text} must hold token ids, got an empty file")
    return rows


def _ids(text: str, what: str) -> list[int]:
    parts = text.replace(",", " ").split()
    known = all(part.isascii() and part.isdecimal() and len(part) < 19 for part in parts)
    if not parts or not known:
        raise WrongInput(f"{what} must hold token ids like 1,2,3, got {text[:40]!r}")
    return [int(part) for part in parts]


class _Live:
    """One row on stdout, as it comes: its text, or its ids."""

    def __init__(self) -> None:
        self.first, self.shown = True, 0

    def add(self, row: Row, token: int | None) -> None:
        """What a step added to the row."""
        if row.text is not None:
            piece, self.shown = row.text[self.shown :], len(row.text)
        elif token is None:
            piece = ""
        else:
            piece, self.first = str(token) if self.first else f",{token}", False
        print(piece, end="", flush=True)


def _write(writing: Stream, live: _Live | None, most: int) -> tuple[float, float]:
    """Run to the end, or to an interruption: seconds to the first step, and of the others."""
    # What is printed as it comes shows itself how far it is.
    progress = Progress(most, lines=False) if live is None else None
    start = first = last = time.perf_counter()
    try:
        if progress is not None:
            progress("reading the prompt")
        for count, step in enumerate(writing):
            last = time.perf_counter()
            if progress is not None:
                progress("generating")
            first = first if count else last
            if live is not None:
                live.add(writing.rows[0], step[0])
    except KeyboardInterrupt:  # between two steps; the stream deals with one inside a step
        writing.interrupt()
    if live is not None:
        live.add(writing.rows[0], None)  # what an interruption left
        print(flush=True)
    if progress is not None:
        progress.close()
    return first - start, last - first


def _results(
    writing: Stream, prompts: list[list[int]], seconds: tuple[float, float]
) -> dict[str, Any]:
    rows = [
        {"prompt": prompt, "tokens": row.tokens, "text": row.text}
        | {"finish_reason": row.finish_reason, "stopped_by": row.stopped_by}
        for prompt, row in zip(prompts, writing.rows, strict=True)
    ]
    # The first token of a row comes with its prompt.
    after = sum(max(0, len(row.tokens) - 1) for row in writing.rows)
    tokens = sum(map(len, prompts))
    return {
        "rows": rows,
        "decode_mode": writing.decode_mode,
        "speculation": None if writing.speculation is None else writing.speculation.results(),
        "prompt_tokens": tokens,
        "prompt_seconds": seconds[0],
        "prompt_tokens_per_second": tokens / seconds[0] if seconds[0] else None,
        "generated_tokens": sum(len(row.tokens) for row in writing.rows),
        "generation_seconds": seconds[1],
        "tokens_per_second": after / seconds[1] if after and seconds[1] else None,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    for b, row in enumerate(rows):
        if row["text"] is None:
            print(",".join(map(str, row["tokens"])))
        else:
            print(row["text"] if len(rows) == 1 else f"[{b}] {row['text']}")
    sys.stdout.flush()


def _summary(found: dict[str, Any]) -> str:
    def rate(per_second: float | None) -> str:
        return "" if per_second is None else f" ({per_second:.1f} tokens/s)"

    mode = "" if found["decode_mode"] == CALLS else f", decoded by {found['decode_mode']}"
    if guesses := found.get("speculation"):
        mode += f", {guesses['accepted']} of {guesses['guessed']} guesses kept"
    return (
        f"prompt: {found['prompt_tokens']} tokens{rate(found['prompt_tokens_per_second'])}, "
        f"generated: {found['generated_tokens']} tokens{rate(found['tokens_per_second'])}{mode}"
    )
