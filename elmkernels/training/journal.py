"""The log of a run: OUT/train.jsonl, a line of progress, and TensorBoard where it is asked for.

Every line of the file is an object with `event` and `step`: "start", "resume", "peak", "step",
"evaluation", "saved", "skipped", "stopped", "end". A run that goes on from an earlier step repeats
the steps after it; `curve` takes the last of each.
"""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "train.jsonl"


class NotSaved(OSError):
    """Something of a run that couldn't be written; what was written before is as it was."""


class Journal:
    """Writes; one process of a run has it. total: steps of the run, for the bar."""

    def __init__(self, out: Path, total: int, tensorboard: bool = False) -> None:
        self.path, self.total = out / FILE, total
        try:
            out.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink():  # what is written must be in this folder
                raise ValueError(
                    f"{self.path} must be a file, got a link to {self.path.readlink()}"
                )
            _drop_torn_line(self.path)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise NotSaved(f"{self.path} can't be written: {error}") from error
        self._board = _board(out / "tensorboard") if tensorboard else None
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self._bar = tqdm(total=total, file=sys.stderr, unit="step", leave=False)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Append one line and, of numbers, points of TensorBoard's curves."""
        line = {"event": event, "step": step, **values}
        try:
            self._file.write(json.dumps({k: _plain(v) for k, v in line.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise NotSaved(f"{self.path} can't be written: {error}") from error
        if self._board is not None and event in ("step", "evaluation"):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, loss: float, speed: float, mfu: float, more: str = "") -> None:
        """The numbers of a logged step: beside the bar, or as a line where there is none."""
        numbers = f"loss {loss:.4f}, {speed:,.0f} tokens/s, MFU {mfu:.1%}{more}"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers)
        else:
            self.say(f"step {step}/{self.total}: {numbers}")

    def say(self, text: str) -> None:
        """A line on stderr, past the bar."""
        if self._bar is not None:
            self._bar.clear()
        if sys.stderr is not None:
            with suppress(OSError):  # nobody hears it: no reason to end a run
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        try:
            self._file.close()
        except OSError:  # what can't be written was told by `event`
            return


def _plain(value: Any) -> Any:
    """NaN and infinities by name: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _drop_torn_line(path: Path) -> None:
    """A process that was killed may have left half a line."""
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "keep.tensorboard needs tensorboard: pip install 'elmkernels[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))


def events(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a journal, without one that was torn. Raises FileNotFoundError, and ValueError
    for what no run has written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a log of a run: {error}") from error
    for line in found:
        if not isinstance(line, dict) or not {"event", "step"} <= line.keys():
            raise ValueError(f"{path}: a line must have event and step, got {_short(line)}")
    return found


def _short(line: Any) -> str:
    text = json.dumps(line)
    return text if len(text) <= 60 else f"{text[:57]}..."


def curve(path: str | Path, event: str = "step", value: str = "loss") -> dict[int, float]:
    """{step: value} of a run; of steps that were done twice the later."""
    found = {e["step"]: float(e[value]) for e in events(path) if e["event"] == event}
    return dict(sorted(found.items()))
