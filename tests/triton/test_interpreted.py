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

TESTS = Path(__file__).parents[1]
OPS = (
    "rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu", "attention", "linear",
    "linear_cross_entropy",
)  # fmt: skip


def run(*arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("op", OPS)
def test_parity(op):
    # "add_rms_norm-huge-..." holds "rms_norm-" too.
    others = "".join(f" and not {o}-" for o in OPS if op in o and o != op)
    run(str(TESTS / "ops" / "test_parity.py"), "-k", f"{op}- and triton-cpu{others}")


def test_contract():
    names = ("contract", "layouts", "attention_contract", "attention_choice", "packed")
    run(*(str(TESTS / "ops" / f"test_{name}.py") for name in names), "-k", "triton")


def test_contract_of_the_loss():
    run(str(TESTS / "ops" / "test_linear_cross_entropy.py"), "-k", "triton")


@pytest.mark.parametrize("which", ["", "_linear", "_decoding"])
def test_corners(which):
    run(str(TESTS / "triton" / f"interpreted{which}.py"))


def test_contract_of_linear():
    run(str(TESTS / "ops" / "test_linear_fused.py"), "-k", "triton")
