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


# Of `linear`, whose cases take their time: a group size of each number of bits, some numbers of
# rows, the smallest and the largest model. The slow test has them all.
LEFT = {
    "linear": (
        "affine8_32", "affine4_64", "rows_2", "rows_4", "rows_5", "rows_6", "rows_7",
        "450M", "1_1B",
    ),
}  # fmt: skip


def parity(op: str, left: tuple[str, ...] = ()) -> None:
    # "add_rms_norm-huge-..." holds "rms_norm-" too.
    others = [f"{o}-" for o in OPS if op in o and o != op]
    without = "".join(f" and not {name}" for name in (*others, *left))
    run(str(TESTS / "ops" / "test_parity.py"), "-k", f"{op}- and triton-cpu{without}")


@pytest.mark.parametrize("op", OPS)
def test_parity(op):
    parity(op, LEFT.get(op, ()))


@pytest.mark.slow
@pytest.mark.parametrize("op", LEFT)
def test_parity_of_every_case(op):
    parity(op)


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
