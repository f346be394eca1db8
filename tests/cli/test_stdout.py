"""stdout and stderr that are closed or full, for every command: one line, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import TINY

from elmkernels.cli.main import main

FULL = Path("/dev/full")
MODEL = ["--checkpoint", str(TINY), "--device", "cpu"]
GENERATE = ["generate", *MODEL, "--ids", "1,2,3", "--max-new-tokens", "2"]
PARITY = ["parity", "attention", "--dtype", "fp32", "--backend", "sdpa"]
# What prints at once, at the end, as JSON, while it goes on, and before there is a command.
COMMANDS = [
    ["--help"], ["generate", "--help"], ["--version"], ["info"], ["info", "--json"], GENERATE,
    [*GENERATE, "--stream"], [*GENERATE, "--json"], PARITY,
    ["check", "--quick", *MODEL, "--rounds", "1", "--dtype", "bf16"],
    ["convert", "--checkpoint", str(TINY), "--to", "quantized", "--out", "OUT"],
]  # fmt: skip
SAID = "elmkernels: error: stdout can't be written: No space left on device"
CLOSED = "elmkernels: error: stdout is closed: give it a place, if only /dev/null"

needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no full device")


@needs_full
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c).replace(str(TINY), "TINY"))
def test_full(capsys, monkeypatch, tmp_path, command, buffered):
    argv = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    with FULL.open("w") as full:
        full.reconfigure(write_through=not buffered)
        monkeypatch.setattr(sys, "stdout", full)
        assert main(argv) == 2
        monkeypatch.undo()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert lines[-1] == SAID
    assert all(line.startswith("elmkernels: ") for line in lines)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c).replace(str(TINY), "TINY"))
def test_closed(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(command) == 2
    monkeypatch.undo()
    assert capsys.readouterr().err == f"{CLOSED}\n"
    assert list(tmp_path.iterdir()) == []


def run(command: list[str], redirection: str, unbuffered: bool = False):
    return subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$@" {redirection}',
            "sh",
            sys.executable,
            "-m",
            "elmkernels",
            *command,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1" if unbuffered else ""},
    )


@needs_full
@pytest.mark.parametrize(
    ("command", "redirection", "unbuffered", "said"),
    [
        (["info"], ">/dev/full", False, SAID),
        (["--help"], ">/dev/full", True, SAID),
        ([*GENERATE, "--stream"], ">&-", False, CLOSED),
    ],
)
def test_as_a_user_starts_it(command, redirection, unbuffered, said):
    done = run(command, redirection, unbuffered)
    assert done.returncode == 2
    assert done.stderr == f"{said}\n"


@pytest.mark.parametrize("stderr", ["closed", "full"])
@pytest.mark.parametrize("command", [GENERATE, PARITY])
def test_nobody_hears_what_is_said(capsys, monkeypatch, command, stderr):
    """What is for stderr goes nowhere then, and never to stdout."""
    if stderr == "full" and not FULL.exists():
        pytest.skip("there is no full device")
    with open(FULL if stderr == "full" else os.devnull, "w") as full:
        monkeypatch.setattr(sys, "stderr", full if stderr == "full" else None)
        assert main([*command, "--json"]) == 0
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # closing flushes what is left
    out = capsys.readouterr().out
    assert out.startswith("{") and "elmkernels: " not in out
