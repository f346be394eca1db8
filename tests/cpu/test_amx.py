"""Tiles: their instructions emulated, as machines that have them are few, and what is said where
they can't be had."""

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_setup

from elmkernels.backends import AMX, BACKENDS, BASES
from elmkernels.libraries import PACKAGE

DRIVER = Path(__file__).parent / "emulated_amx.py"
HERE = BACKENDS[BASES[AMX]].missing


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with the package, whose library of tiles emulates them."""
    if HERE is not None:
        pytest.skip(f"the base of tiles is missing: {HERE}")
    setup = load_setup()
    if setup.compiler() is None:
        pytest.skip("no C++ compiler was found")
    folder = tmp_path_factory.mktemp("emulated")
    to = folder / "elmkernels"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, to, ignore=ignored)
    for library in PACKAGE.glob("_avx*.so"):
        if library.stem != f"_{AMX}":
            (to / library.name).symlink_to(library)
    library = setup.plan(AMX, setup.torch_root())
    library.flags = [flag for flag in library.flags if not flag.startswith("-mamx")]
    library.flags.append("-DELMKERNELS_EMULATED_AMX")
    work = folder / "work"
    work.mkdir()
    _, failed = setup.compile_all([library], work)
    assert not failed, failed
    library.finish(work, to / f"_{AMX}.so")
    shutil.rmtree(work)
    return folder


def answers(package: Path, *questions: str) -> dict:
    """{question: {what: why not}}."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, str(DRIVER), *questions]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert found.pop("missing") is None
    assert list(found) == list(questions)
    return found


def test_emulated_tiles_are_the_reference(package):
    """In every case and in shapes that are no whole tiles; forward and backward."""
    found = answers(package, "parity", "shapes", "bits", "products", "choices", "models")
    wrong = {what: why for of in found.values() for what, why in of.items() if why}
    assert not wrong
    assert len(found["parity"]) > 60 and len(found["shapes"]) == 42


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> ctypes.CDLL:
    cxx = shutil.which("g++")
    if cxx is None:
        pytest.skip("no g++ was found")
    built = tmp_path_factory.mktemp("trial") / "trial.so"
    source = Path(__file__).parent / "amx_trial.cpp"
    command = [cxx, "-std=c++20", "-Wall", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, source, "-o", built], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(built))
    library.asked.restype = library.tried.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP])
def test_a_kernel_that_refuses_is_named(trial, error):
    said = "the kernel doesn't let this process use the processor's tiles (arch_prctl: "
    assert trial.asked(error).decode() == f"{said}{os.strerror(error)})"
    assert trial.asked(0) is None


def test_a_machine_that_traps_on_what_it_advertises_is_found_in_a_child(trial):
    assert trial.tried(0) is None
    assert trial.tried(1) == b"a product of tiles was wrong in a trial"
    for s in (signal.SIGILL, signal.SIGSEGV):
        said = trial.tried(s).decode()
        assert said.startswith("this machine advertises tiles, but a trial of them ended with: ")
        assert said.endswith(signal.strsignal(s))


INFO = """
import torch
torch.cpu._is_amx_tile_supported = lambda: True
from elmkernels.cli.main import main
main(["info"])
"""


@pytest.mark.skipif(not (PACKAGE / f"_{AMX}.so").is_file(), reason="it isn't built here")
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="this processor has tiles")
def test_the_real_library_is_refused_by_this_machine_and_says_so():
    """A processor that says it has tiles and a kernel that knows better: nothing crashes, and the
    next backend is taken."""
    done = subprocess.run([sys.executable, "-c", INFO], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines: dict[str, str] = {}
    for line in filter(str.strip, done.stdout.splitlines()):
        lines.setdefault(line.split()[0], line)
    said = "cpu, missing: the kernel doesn't let this process use the processor's tiles"
    assert said in lines[AMX]
    if HERE is None:
        assert f"cpu: {BASES[AMX]}" in lines["attention"]
