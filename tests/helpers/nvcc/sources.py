"""The sources of csrc/cuda compiled: a library of nvcc's host code, and the PTX of its kernels."""

import ctypes
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from .. import ROOT, load_setup

FOLDER = ROOT / "tests" / "cuda" / "ptx"


class Compiled(NamedTuple):
    """nvcc's host code as a library, and the PTX of its kernels."""

    library: ctypes.CDLL
    ptx: str


def compile_in(folder: Path, source: Path = FOLDER / "recorded.cu") -> tuple[Path, str]:
    """Compile a source of all kernels; skips if nvcc or a host compiler isn't there.

    Returns:
        The library's path and the PTX.
    """
    setup = load_setup()
    nvcc, cxx = setup.nvcc(), setup.compiler()
    if nvcc is None or cxx is None:
        pytest.skip("nvcc was not found" if nvcc is None else "no C++ compiler was found")
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")]
    # The host code isn't optimized, which the device code doesn't know of.
    command = [
        nvcc, "-std=c++20", "-O0", "-Xcompiler=-fPIC,-w", "-DUSE_CUDA", setup.TARGET,
        "-DELMKERNELS_BACKEND=elmkernels_cuda", "-gencode=arch=compute_80,code=compute_80",
        *include, "--keep", "--keep-dir", str(folder), "-c", str(source), "-o",
        str(folder / "host.o"),
    ]  # fmt: skip
    library = folder / "host.so"
    link = [
        cxx, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-Wl,-Bsymbolic", *include,
        str(FOLDER / "runtime.cpp"), str(folder / "host.o"), f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu", "-ldl", "-o", str(library),
    ]  # fmt: skip
    for line in (command, link):
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    ptx = (folder / f"{source.stem}.ptx").read_text()
    for intermediate in folder.glob(f"{source.stem}.*"):
        intermediate.unlink()
    return library, ptx


def plain_name(mangled: str) -> str:
    """A kernel's name without its namespace and its types."""
    found = re.findall(
        r"(?<![a-z_])\d*((?:norm|heads)_(?:fwd|bwd)|sum_partials|decode_step_kernel)I", mangled
    )
    return found[-1] if found else mangled


_FUNCTION = re.compile(
    r"^(?:\.visible |\.weak )?\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*\([^)]*\)"
    r"\s*(?:\.\w+[^\n{;]*\n)*\{.*?^\}",
    re.M | re.S,
)
_CALL = re.compile(r"call(?:\.uni)?\s+(?:\([^)]*\)\s*,\s*)?([\w$]+)\s*[,;]")


def of_kernel(ptx: str, name: str) -> str:
    """The part of a PTX file that a kernel and what it calls are in, and what is before all."""
    bodies = {m[1]: m for m in _FUNCTION.finditer(ptx)}
    wanted = [name]
    for one in wanted:  # which grows by what is called
        wanted += [c for c in dict.fromkeys(_CALL.findall(bodies[one][0])) if c not in wanted]
    first = min(m.start() for m in bodies.values())
    return ptx[:first] + "\n".join(m[0] for n, m in bodies.items() if n in wanted)
