"""The command line as tests call it: in this process, or as a user starts it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from elmkernels.cli.main import main

from . import GOLDEN

TINY = GOLDEN / "hf_tiny"


def run_json(capsys: pytest.CaptureFixture, *argv: str, code: int = 0) -> dict:
    """What a command prints with --json, which must be one JSON value and nothing else."""
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def start(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "elmkernels", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def refusal(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line that wrong input gets."""
    assert main([*argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("elmkernels: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
