"""Progress as a terminal and as a file show it, and what --out says it wrote."""

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest

from elmkernels.bench import chart
from elmkernels.cli import console
from elmkernels.cli.console import Output, Progress, WrongInput
from elmkernels.openelm.progress import elapsed_and_left, seconds_left


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.4, 0, 5), "0:00"),
        ((75, 0, 5), "1:15"),
        ((10, 1, 5), "0:10, about 0:40 left"),
        ((3600, 2, 3), "1:00:00, about 30:00 left"),
        ((8, 5, 5), "0:08, about 0:00 left"),
        ((8, 7, 5), "0:08, about 0:00 left"),
    ],
)
def test_elapsed_and_left(arguments, text):
    assert elapsed_and_left(arguments[0], seconds_left(*arguments)) == text


def test_a_line_for_each_stage(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = Progress(3)
    progress("model")
    now[0] = 20.0
    progress("parity")
    now[0] = 50.0
    progress("speed")
    progress.print("figures")
    progress.close()
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "[1/3] model (0:00)",
        "[2/3] parity (0:20, about 0:40 left)",
        "[3/3] speed (0:50, about 0:25 left)",
    ]
    assert captured.out == "figures\n"


def test_no_lines_where_none_are_wanted(capsys):
    progress = Progress(3, lines=False)
    progress("token")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_the_line_of_a_terminal_lives(monkeypatch):
    """It is painted again while a stage takes its time, and gone at the end."""
    monkeypatch.setattr(console, "TICK", 0.01)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(2)
    progress("slow")
    deadline = time.monotonic() + 20
    while terminal.getvalue().count("[1/2] slow") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    progress.close()
    text = terminal.getvalue()
    assert text.count("\r\x1b[K[1/2] slow (0:0") >= 4
    assert text.endswith("\r\x1b[K") and "\n" not in text
    time.sleep(0.05)
    assert terminal.getvalue() == text


def test_what_is_left_is_counted_down_while_a_stage_takes_its_time(monkeypatch):
    now, terminal = [0.0], Terminal()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(3)
    progress("one")
    now[0] = 20.0
    progress("two")
    now[0] = 29.0
    assert progress._line() == "[2/3] two (0:29, about 0:31 left)"
    now[0] = 99.0
    assert progress._line() == "[2/3] two (1:39, about 0:00 left)"
    progress.close()


def test_many_stages_a_second_are_not_all_painted(monkeypatch):
    now, terminal = [0.0], Terminal()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "TICK", 1e6)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(1000)
    for i in range(1000):
        now[0] = i / 1000
        progress("token")
    progress.close()
    assert 5 <= terminal.getvalue().count("token") <= 11


def test_a_line_of_a_terminal_is_not_wider(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(1)
    progress("x" * 500)
    progress.close()
    assert max(map(len, re.split(r"\r\x1b\[K", terminal.getvalue()))) == 79


def test_output_says_what_it_wrote(capsys, tmp_path):
    output = Output(str(tmp_path / "a" / "b"))
    output.save({"complete": False})
    output.save({"complete": True})
    output.write("summary.md", "any")
    output.draw(lambda folder: [])
    output.tell()
    assert json.loads((tmp_path / "a/b/results.json").read_text()) == {"complete": True}
    written = f"elmkernels: wrote results.json, summary.md to {tmp_path / 'a' / 'b'}\n"
    assert capsys.readouterr() == ("", written)


def picture(folder: Path) -> list[str]:
    (folder / "chart.png").write_bytes(b"picture")
    return ["chart.png"]


def test_a_picture_is_named_once_it_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(chart, "missing", lambda: None)
    output = Output(str(tmp_path), charts=True)
    output.draw(picture)
    output.tell()
    assert capsys.readouterr().err == f"elmkernels: wrote chart.png to {tmp_path}\n"


def test_without_matplotlib_that_is_said_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(chart, "missing", lambda: "no picture: pip install it")
    output = Output(str(tmp_path), charts=True)
    assert capsys.readouterr().err == "elmkernels: no picture: pip install it\n"
    output.draw(picture)
    assert not list(tmp_path.iterdir())


def test_no_output_is_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Output(None, charts=True)
    output.save({"any": 1})
    output.tell()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_wrong_input(tmp_path):
    (tmp_path / "file").write_text("any")
    with pytest.raises(WrongInput, match="file"):
        Output(str(tmp_path / "file"))
