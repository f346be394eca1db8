"""What the assembler makes of the PTX that is executed: registers that the launches have, shared
memory as the executor lays it out, and no local memory that the PTX doesn't declare.
"""

import re
import subprocess
from pathlib import Path

import pytest
from helpers.nvcc.sources import of_kernel, plain_name

from elmkernels.testing.ptx import Program, parse

REGISTERS, MOST = 64 * 1024, 255  # of a multiprocessor, of a thread
# A kernel of each kind: a pattern of its name and of the types in it.
QUICK = (
    "norm_fwdI13__nv_bfloat16S0_Li8ELb0E", "norm_bwdI13__nv_bfloat16S0_Li8ELb1E",
    "sum_partialsI13__nv_bfloat16E", "heads_fwdILi8E13__nv_bfloat16S\\d_E",
    "heads_bwdILi8E13__nv_bfloat16S\\d_E",
)  # fmt: skip


def kernels(ptx: str) -> list[str]:
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


def assembled(ptx: str, nvcc: str, folder: Path) -> dict[str, dict[str, int]]:
    """{kernel: its registers and bytes of stack, spilled, shared}, as ptxas says."""
    assembler = Path(nvcc).resolve().parent / "ptxas"
    (folder / "kernels.ptx").write_text(ptx)
    command = [assembler if assembler.exists() else "ptxas", "-v", "-arch=sm_80", "-o"]
    done = subprocess.run(
        [*command, str(folder / "kernels.cubin"), str(folder / "kernels.ptx")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for part in re.split(r"Compiling entry function ", done.stderr)[1:]:
        name = re.match(r"'(\w+)'", part)
        assert name is not None
        numbers = {"shared": 0}
        for what, pattern in {
            "registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame",
            "stored": r"(\d+) bytes spill stores", "loaded": r"(\d+) bytes spill loads",
            "shared": r"(\d+) bytes smem",
        }.items():  # fmt: skip
            if match := re.search(pattern, part):
                numbers[what] = int(match[1])
        found[name[1]] = numbers
    return found


def judge(ptx: str, name: str, numbers: dict[str, int]) -> None:
    program = Program(parse(of_kernel(ptx, name), name), name)
    threads = program.function.threads
    assert threads is not None, name
    assert numbers["registers"] <= min(MOST, REGISTERS // threads), (plain_name(name), numbers)
    assert (numbers["stored"], numbers["loaded"]) == (0, 0), (plain_name(name), numbers)
    declared = [v.size for v in program.function.variables if v.space == "local"]
    calls = any(v.name[0].isdigit() for v in program.function.variables)
    assert calls or numbers["stack"] <= sum(declared), (plain_name(name), numbers)
    assert numbers["shared"] == program.static_shared, (plain_name(name), numbers)


@pytest.fixture
def nvcc(compiled) -> str:
    from helpers import load_setup

    return load_setup().nvcc()


def test_a_kernel_of_each_kind(compiled, nvcc, tmp_path):
    names = [n for n in kernels(compiled.ptx) if any(re.search(q, n) for q in QUICK)]
    assert len(names) == len(QUICK), names
    for name in names:
        (tmp_path / name[-20:]).mkdir()
        numbers = assembled(of_kernel(compiled.ptx, name), nvcc, tmp_path / name[-20:])
        judge(compiled.ptx, name, numbers[name])


@pytest.mark.slow
def test_every_kernel(compiled, nvcc, tmp_path):
    found = assembled(compiled.ptx, nvcc, tmp_path)
    names = kernels(compiled.ptx)
    assert set(found) == set(names) and len(names) > 60
    for name in names:
        judge(compiled.ptx, name, found[name])
