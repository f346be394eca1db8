"""What the commands of the command line share: progress, JSON, what they write, how they end."""

import argparse
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__, interrupts
from ..bench import chart
from ..bench.benchmark import Benchmark, Report, Results
from ..openelm.progress import elapsed_and_left, seconds_left
from ..weights.storage import made_folder, remove_empty, replacing, try_to_write
from ..weights.texts import read_json

OK, FAILED, WRONG, PIPE_CLOSED = 0, 1, 2, 141
# What loading, choosing and checking raise for wrong input.
REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError)
RESULTS = "results.json"
# Seconds between two paintings of the line on a terminal: if nothing new is said, and if much is.
TICK, LEAST = 1.0, 0.1


class WrongInput(Exception):
    """Something the caller can put right; its text is the one line they see."""


def checked(fn: Callable, *args: Any) -> Any:
    """Call something that refuses wrong input with an exception; its text becomes one line."""
    try:
        return fn(*args)
    except REFUSALS as error:
        raise WrongInput(words(error)) from error


def words(error: BaseException) -> str:
    """What an exception says, without the number of a system's error."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror}"
    return str(error)


def note(text: str) -> None:
    """One line on stderr."""
    say(f"elmkernels: {' '.join(text.split())}")


def say(text: str, end: str = "\n") -> None:
    """Print on stderr, if it is there and can be: nothing ends because nobody could be told."""
    if sys.stderr is not None:  # else `print` would take stdout
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def escaped_stdout() -> Iterator[None]:
    """Meanwhile stdout escapes what its encoding doesn't have: no text ends a command."""
    out = sys.stdout
    before = getattr(out, "errors", None)
    if before is None or not hasattr(out, "reconfigure"):  # an object of the caller's own
        yield
        return
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe can't be flushed
            out.reconfigure(errors=before)


class StdoutFailed(WrongInput):
    """What stdout is can't be written to. No OSError, which argparse passes over."""


class _Watched:
    """stdout, whose errors are known as its own."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, text: str) -> int:
        return self._told(self._out.write, text)

    def flush(self) -> None:
        self._told(self._out.flush)

    def _told(self, fn: Callable, *args: Any) -> Any:
        try:
            return fn(*args)
        except BrokenPipeError:  # a reader that has enough is no error
            raise
        except OSError as error:
            raise StdoutFailed(f"stdout can't be written: {words(error)}") from error


@contextlib.contextmanager
def watched_stdout() -> Iterator[None]:
    """Meanwhile stdout raises StdoutFailed if it can't be written."""
    out = sys.stdout
    if out is None:
        yield
        return
    sys.stdout = _Watched(out)
    try:
        yield
    finally:
        sys.stdout = out


class Progress:
    """How far a command is, how long it took so far and about how long the rest will take, on
    stderr: a line that is painted anew every second on a terminal, else a line for each stage.

    total: how many stages there are. lines: print them where stderr is no terminal.
    """

    def __init__(self, total: int, lines: bool = True) -> None:
        self.total, self.lines, self.count, self.text = total, lines, 0, ""
        self.start = self.stage_start = time.monotonic()
        self._left: float | None = None  # as it was when the stage began
        self._painted = -LEAST
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._live = sys.stderr is not None and sys.stderr.isatty()
        if self._live:
            threading.Thread(target=self._tick, daemon=True).start()

    def __call__(self, text: str) -> None:
        """Say what comes next."""
        with self._lock:
            self.stage_start = time.monotonic()
            self._left = seconds_left(self.stage_start - self.start, self.count, self.total)
            self.count, self.text = self.count + 1, text
            if self._live and self.stage_start - self._painted >= LEAST:
                self._paint()
            elif self.lines and not self._live:
                say(self._line())

    def print(self, text: str) -> None:
        """Print to stdout, past the line."""
        with self._lock:
            self._clear()
            print(text, flush=True)

    def close(self) -> None:
        """Take the line away."""
        with self._lock:
            self._closed.set()
            self._clear()

    def _line(self) -> str:
        now = time.monotonic()
        left = self._left
        if left is not None:
            left = max(0.0, left - (now - self.stage_start))
        spent = elapsed_and_left(now - self.start, left)
        return f"[{min(self.count, self.total)}/{self.total}] {self.text} ({spent})"

    def _tick(self) -> None:
        while not self._closed.wait(TICK):
            with self._lock:
                if self.text and not self._closed.is_set():
                    self._paint()

    def _paint(self) -> None:
        self._painted = time.monotonic()
        line = self._line()[: _columns() - 1]  # a longer one would wrap, and stay
        say(f"\r\x1b[K{line}", end="")

    def _clear(self) -> None:
        if self._live:
            say("\r\x1b[K", end="")


def _columns() -> int:
    """The width of the terminal that stderr is; 80 if that isn't known."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


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


class Output:
    """What --out asked for: a folder with results.json, and what else is written there."""

    def __init__(self, path: str | None, command: str | None = None, charts: bool = False) -> None:
        """Raises WrongInput, before the work, for a folder that can't be written to.

        path: of the folder, made if it is missing, or None for no file at all. command: whose
        results may be replaced there; None if anybody's may. charts: pictures will be asked for;
        why they can't be drawn is noted here.
        """
        self.folder = None if path is None else Path(path)
        self.files: dict[str, None] = {}
        self.failed: dict[str, str] = {}
        if self.folder is None:
            return
        self._made = writable_folder(self.folder)
        if command is not None:
            _refuse_results_of_others(self.folder / RESULTS, command)
        if charts and (reason := chart.missing()):
            note(reason)

    def save(self, results: dict[str, Any]) -> None:
        """results.json, whole or not at all."""
        self.write(RESULTS, dump(results) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write one file."""
        if self.folder is None:
            return
        try:
            replace_text(self.folder / name, text)
        except OSError as error:
            raise WrongInput(words(error)) from error  # which names the file
        self.files[name] = None

    def keep(self, name: str, write: Callable[[], None]) -> None:
        """Write while, or after, something was measured: if that fails, the measuring goes on and
        the results are printed; `tell` then refuses.
        """
        self.failed.pop(name, None)
        try:
            write()
        except WrongInput as error:
            self.failed[name] = str(error)
            self.files.pop(name, None)

    def draw(self, draw: Callable[[Path], list[str]]) -> None:
        """Have pictures drawn into the folder, if they can be; `draw` returns their names."""
        if self.folder is not None and chart.missing() is None:
            self.files |= dict.fromkeys(checked(draw, self.folder))

    def tell(self) -> None:
        """Say on stderr what was written; raises WrongInput for what was not."""
        if self.files:
            note(f"wrote {', '.join(self.files)} to {self.folder}")
        if self.failed:
            if not self.files:
                remove_empty(self._made)
            raise WrongInput("; ".join(dict.fromkeys(self.failed.values())))


def writable_folder(folder: Path) -> list[Path]:
    """Make the folder of --out if it is missing, and see that a file can be written there; gives
    the folders that were made. Raises WrongInput, and leaves none, if that can't be.
    """
    if checked(folder.exists) and not folder.is_dir():
        raise WrongInput(f"--out must be a folder, got the file {folder}")
    try:
        with made_folder(folder) as made:
            try_to_write(folder)
    except OSError as error:
        raise WrongInput(f"--out: {folder} can't be written to: {error.strerror}") from error
    return made


def _refuse_results_of_others(file: Path, command: str) -> None:
    """Results are replaced by a new run of the same command alone."""
    if not file.exists():
        return
    try:
        found = read_json(file).get("command")
    except (OSError, ValueError):
        found = None
    if found != command:
        whose = f"results of {found!r}" if isinstance(found, str) else "other results"
        raise WrongInput(f"--out: {file} has {whose}, not of {command!r}: give another folder")


def measure(
    args: argparse.Namespace,
    output: Output,
    progress: Progress | None,
    results: dict[str, Any],
    work: Callable[[], None],
) -> int:
    """Do the work that fills `results`; whatever ends it, what is there is kept and printed.
    progress: to end with it, if this process shows any.
    """
    code = OK
    try:
        work()
    except KeyboardInterrupt:
        code = interrupts.exit_code()
    finally:
        if progress is not None:
            progress.close()
        output.keep(RESULTS, lambda: output.save(results))
    if args.json:
        print(dump(results))
    if code != OK:
        kept = f"; {output.folder / RESULTS} has" if RESULTS in output.files else ""
        note("interrupted" + (f"{kept} what was measured" if kept else ""))
    return code


class CommandReport(Report):
    """A benchmark's report on the command line: stages on stderr, parts on stdout unless that is
    for JSON alone.
    """

    def __init__(self, progress: Progress, save: Callable[[], None], quiet: bool) -> None:
        self._progress, self._save, self._quiet = progress, save, quiet

    def stage(self, text: str) -> None:
        self._progress(text)

    def print(self, text: str) -> None:
        if not self._quiet:
            self._progress.print(text)

    def save(self) -> None:
        self._save()


def carry_out(
    args: argparse.Namespace,
    benchmark: Benchmark,
    earlier: Results | None = None,
    run: Callable[[Results, Report], None] | None = None,
) -> int:
    """Run a benchmark as a command: show how far it is, keep its results, report and charts.

    Args:
        args: its options --out and --json, and the command's name.
        benchmark: what is measured.
        earlier: results of an earlier run, to go on from.
        run: has it measured; `benchmark.run` if None.

    Returns:
        The exit code.
    """
    output = Output(args.out, args.command, charts=True)
    about = {"elmkernels": __version__, "command": args.command}
    results = {**about, **benchmark.start(), **(earlier or {})}
    progress = Progress(benchmark.stages)
    save = partial(output.keep, RESULTS, lambda: output.save(results))
    report = CommandReport(progress, save, args.json)
    work = benchmark.run if run is None else run
    code = measure(args, output, progress, results, lambda: work(results, report))
    found = plain(results)
    if text := benchmark.summary(found):
        output.keep("summary.md", lambda: output.write("summary.md", text))
        report.print(text)
    output.keep("charts", lambda: output.draw(lambda folder: benchmark.chart(found, folder)))
    output.tell()
    if code != OK and output.folder is None and not args.json:
        note("what was measured is printed; --out keeps it in a file")
    return code or (OK if found["complete"] and benchmark.passed(found) else FAILED)
