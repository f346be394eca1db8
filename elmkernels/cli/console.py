"""What the commands of the command line share: options, progress, JSON, and how they end."""

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..backends import BACKENDS, PREFERENCE
from ..devices import missing_device
from ..openelm.storage import replacing

OK, FAILED, WRONG, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What loading, choosing and checking raise for wrong input.
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


class WrongInput(Exception):
    """Something the caller can put right; its text is the one line they see."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongInput(message)


class Stages:
    """Progress on stderr: a bar on a terminal that has tqdm, else a line for each stage."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.bar = total, 0, None
        if sys.stderr is not None and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, file=sys.stderr, leave=False)

    def __call__(self, text: str) -> None:
        self.count += 1
        if self.bar is None:
            print(f"[{self.count}/{self.total}] {text}", file=sys.stderr, flush=True)
            return
        self.bar.n = self.count - 1
        self.bar.set_description(text)

    def print(self, text: str) -> None:
        """Print to stdout, past the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def one_of(names: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """A parser of one or more names, separated by commas."""
    known = list(names)

    def parse(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        bad = [name for name in found if name not in known]
        if bad or not found:
            raise argparse.ArgumentTypeError(
                f"{what} must be one of {', '.join(known)}, got {bad[0] if bad else text!r}"
            )
        return found

    return parse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def add_shared(parser: argparse.ArgumentParser, default: Any = None) -> None:
    """The options of every command; as default of a sub-command, what came before it stays."""
    add = parser.add_argument
    missing = {"default": default}
    add("--json", action="store_true", help="print JSON on stdout and nothing else", **missing)
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)", **missing)
    add(
        "--dtype",
        type=one_of(DTYPES, "dtype"),
        action="extend",
        metavar="DTYPE[,...]",
        help="fp32, bf16, fp16",
        **missing,
    )
    add(
        "--backend",
        type=one_of(tuple(BACKENDS), "backend"),
        action="extend",
        metavar="NAME[,...]",
        help=f"{', '.join(BACKENDS)} (default: all, or the preferred)",
        **missing,
    )


def add_files(parser: argparse.ArgumentParser, default: Any, quick: bool = True) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", default=default, help="write results.json (and chart.png) there")
    if quick:
        add("--quick", action="store_true", default=default, help="fewer, shorter measurements")


def find_device(text: str | None) -> torch.device:
    """A device that is here, by name."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in PREFERENCE:
        raise WrongInput(f"device must be {' or '.join(PREFERENCE)}, got {text!r}")
    if missing := missing_device(device):
        raise WrongInput(missing)
    return device


def checked(fn: Callable, *args: Any) -> Any:
    """Call something that refuses wrong input with an exception; its text becomes one line."""
    try:
        return fn(*args)
    except REFUSALS as error:
        raise WrongInput(str(error)) from error


def dtypes_of(args: argparse.Namespace, default: tuple[str, ...]) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys(DTYPES[name] for name in args.dtype or default))


def out_folder(args: argparse.Namespace) -> Path | None:
    """The folder of --out, made if it is missing."""
    if args.out is None:
        return None
    folder = Path(args.out)
    checked(lambda: folder.mkdir(parents=True, exist_ok=True))
    return folder


def plain(x: Any) -> Any:
    """Values that JSON has: dtypes by name, what is not finite as null."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x if isinstance(x, str | int | float | None) else str(x)


def dump(results: dict[str, Any]) -> str:
    return json.dumps(plain(results), indent=1, allow_nan=False)


def replace_text(path: Path, text: str) -> None:
    """Write a file under another name until it is whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def save(folder: Path | None, results: dict[str, Any]) -> None:
    """results.json, whole or not at all."""
    if folder is None:
        return
    try:
        replace_text(folder / "results.json", dump(results) + "\n")
    except OSError as error:
        raise WrongInput(f"results can't be written: {error}") from error


def note(text: str) -> None:
    print(f"elmkernels: {' '.join(text.split())}", file=sys.stderr, flush=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a measurement as Ctrl-C does."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated meanwhile. Only the main thread may ask for signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(
    args: argparse.Namespace,
    stages: Stages | None,
    results: dict[str, Any],
    work: Callable[[], None],
) -> int:
    """Do the work that fills `results`; whatever ends it, what is there is kept and printed.
    stages: the progress to end with it, if this process shows any.
    """
    folder = out_folder(args)
    code = OK
    try:
        with _terminable():
            work()
    except KeyboardInterrupt as error:
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    finally:
        if stages is not None:
            stages.close()
        save(folder, results)
    if args.json:
        print(dump(results))
    if code != OK:
        note("interrupted" + (f"; {folder / 'results.json'} has what was measured" * bool(folder)))
    return code
