"""Triton's interpreter runs the kernels on the CPU, in a process of its own: Triton reads its
switch, TRITON_INTERPRET, once, at import.

Held to the reference there: the library's own parity cases of every op, in float32 and float16
(the interpreter truncates bfloat16 stores), and what is Triton's alone, in interpreted.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def _run(*arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


def test_kernels_under_the_interpreter():
    _run(str(HERE / "interpreted.py"))


@pytest.mark.parametrize("op", ["rms_norm- and not add"])
def test_parity_under_the_interpreter(op):
    _run(str(HERE.parent / "ops" / "test_parity.py"), "-k", f"{op} and triton-cpu")
