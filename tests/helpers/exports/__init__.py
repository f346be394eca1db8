"""Other programs that read this package's files, each in a process of its own: a library that dies
ends no test run.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def asked(program: str, needs: str, **words: object) -> dict:
    """What a program of this folder answers.

    Args:
        program: its file's name, "in_mlx".
        needs: the module without which the test is skipped.
        words: what it is asked.
    """
    if find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{program}.py")],
        input=json.dumps(words, default=str), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{program} ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])
