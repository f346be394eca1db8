"""The compiled libraries: one binary for every torch and every Python, with nothing of either."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elmkernels.backends import BACKENDS, PACKAGE, build_report

LIBRARIES = sorted(PACKAGE.glob("_*.so"))
CPU_LIBRARIES = [path for path in LIBRARIES if path.stem != "_cuda"]

built = pytest.mark.skipif(not LIBRARIES, reason="no library is built here")


def output(tool: str, *arguments: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    command = [path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined(library: Path) -> set[str]:
    lines = output("nm", "-D", "--undefined-only", str(library)).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


@built
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_only_the_stable_c_interface_of_torch_is_used(library):
    names = undefined(library)
    # c10, at, torch and caffe2 as namespaces of mangled C++ names: they change with every torch.
    mangled = {n for n in names if re.search(r"(?<!\d)(3c10|2at|5torch|6caffe2)(?=\d|E)", n)}
    assert not mangled
    assert not {n for n in names if re.match(r"_?Py[A-Z_]", n)}
    assert any(n.startswith("aoti_torch_") for n in names)  # the tool does see torch's names


@built
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_nothing_is_linked_that_torch_brings_its_own_of(library):
    needed = re.findall(r"NEEDED.*\[(.+?)\]", output("readelf", "-d", str(library)))
    forbidden = ("libgomp", "libiomp", "libomp", "libpython", "libtorch_python", "libcudart")
    assert not [name for name in needed if name.startswith(forbidden)]
    assert needed


@built
def test_nothing_of_ours_is_exported():
    """Two libraries of the same sources live in one process: their symbols must not meet."""
    for library in LIBRARIES:
        lines = output("nm", "-D", "--defined-only", str(library)).splitlines()
        strong = {line.split()[-1] for line in lines if line.split()[-2] in "TD"}
        assert not {name for name in strong if "rms" in name or "swiglu" in name}


def test_every_backend_says_why_it_is_missing():
    for backend in BACKENDS.values():
        assert backend.missing is None or len(backend.missing) > 10
    report = build_report()
    for library in LIBRARIES:
        assert report.get(library.stem.removeprefix("_"), "built") == "built"


def other_pythons() -> list[str]:
    """Interpreters on the PATH, besides this one, that can import a torch of at least 2.10."""
    found = []
    code = "import torch; print(int(tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)))"
    for minor in range(10, 16):
        path = shutil.which(f"python3.{minor}")
        if path is None or os.path.samefile(path, sys.executable):
            continue
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == "1":
            found.append(path)
    return found


def test_the_same_binary_loads_in_another_torch():
    if not CPU_LIBRARIES:
        pytest.skip("no CPU library is built here")
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python with a torch of its own is on the PATH")
    loads = "; ".join(f"torch.ops.load_library({str(p)!r})" for p in CPU_LIBRARIES)
    for python in pythons:
        done = subprocess.run(
            [python, "-c", f"import torch; {loads}"], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{python}: {done.stderr}"
