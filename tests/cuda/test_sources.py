"""The CUDA C++ kernels, compiled for every architecture of the build where nvcc is: no GPU needed.

Held to what shows without one: the compiler is silent, no register spills, nothing of torch's
unstable C++ interface is called, and every kernel that the dispatch expects is registered.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from elmkernels.backends import declared, defined, implements

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
NVCC = shutil.which("nvcc") or shutil.which(str(Path(HOME) / "bin" / "nvcc"))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def disassembler() -> str | None:
    """nvcc's, or the one that Triton brings along."""
    found = shutil.which("cuobjdump") or shutil.which(str(Path(HOME) / "bin" / "cuobjdump"))
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        bin = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which(str(bin / "cuobjdump"))
    return found


@pytest.fixture(scope="module")
def nvcc() -> str:
    if NVCC is None:
        pytest.skip("nvcc was not found")
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    missing = [a for a in ARCHITECTURES if f"compute_{a}" not in known.split()]
    if missing:
        pytest.skip(f"this nvcc doesn't know compute_{missing[0]}")
    return NVCC


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_for_every_architecture_without_spills(source, nvcc, tmp_path):
    # What takes a whole GPU for itself may one day take what only Hopper has.
    architectures = (*ARCHITECTURES, "90a") if source.stem == "decode_step" else ARCHITECTURES
    built = tmp_path / "kernel.o"
    command = [
        nvcc, "-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall", "-DUSE_CUDA",
        "--threads=0", STABLE_ABI, "-DELMKERNELS_BACKEND=elmkernels_cuda",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
        f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include"),
        "-c", str(source), "-o", str(built),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "warning" not in printed, printed
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", printed)
    # Of the kernels and of the functions that they call.
    found = r"Function properties for (\w+)\n.* (\d+) bytes spill stores, (\d+) bytes spill loads"
    spills = re.findall(found, printed)
    assert {arch for _, arch in kernels} == set(architectures)
    assert {name for name, _ in kernels} <= {name for name, *_ in spills}
    spilling = [name for name, *counts in spills if counts != ["0", "0"]]
    assert not spilling, spilling
    if dump := disassembler():
        command = [dump, "-sass", "-arch", "sm_90", str(built)]
        sass = subprocess.run(command, capture_output=True, text=True).stdout
        assert "EXIT" in sass
        assert not re.findall(r"\b(?:LDL|STL)\b", sass), "local memory is used"
        if source.stem == "decode_step":  # weights by 16 bytes, past the first-level cache
            assert re.search(r"\bLDG\.E\.NA[\w.]*\.128", sass)
    if nm := shutil.which("nm"):
        symbols = subprocess.run([nm, "-u", built], capture_output=True, text=True).stdout
        assert "aoti_torch_get_current_cuda_stream" in symbols
        unstable = re.findall(r"\b_ZNK?(?:3c10|2at|5torch)\w+", symbols)
        assert not unstable, unstable


def test_every_op_the_dispatch_expects_is_registered():
    found = {name for s in SOURCES for name in re.findall(r'm\.impl\("(\w+)"', s.read_text())}
    assert found == {
        f"{op}_{suffix}" for op in defined() if implements("cuda", op) for suffix in declared(op)
    }
