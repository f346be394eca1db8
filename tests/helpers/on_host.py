"""CUDA sources compiled for the host, by a C++ file of this folder that calls them. simt_host.h is
included before anything else: it stands in for a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from . import ROOT

FOLDER = ROOT / "tests" / "cuda"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    """<name>.cpp as a library in `folder`; skips where there is no compiler."""
    cxx = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if cxx is None:
        pytest.skip("no C++ compiler was found")
    built = folder / f"{name}.so"
    command = [
        cxx, "-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}",
        "-include", str(FOLDER / "simt_host.h"), str(FOLDER / f"{name}.cpp"), "-o", str(built),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))
