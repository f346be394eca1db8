"""The CPU kernels with g++'s address and undefined-behaviour sanitizers in them: every op, every
form of a weight, whole models. See "Sanitizers" in CONTRIBUTING.md.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, load_setup

from elmkernels.backends import BACKENDS, CPU

DRIVER = Path(__file__).parent / "sanitized.py"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
HERE = [name for name in CPU if BACKENDS[name].missing is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE, reason="no compiled kernels for this processor"),
]


def runtime() -> str:
    """The libraries that must be in a process before all others: the address sanitizer's, and the
    one of C++, whose exceptions it looks for when it starts.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ was found")
    found = []
    for library in ("libasan.so", "libstdc++.so"):
        command = ["g++", f"-print-file-name={library}"]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not all(map(os.path.isabs, found)):
        pytest.skip("g++ has no address sanitizer here")
    return " ".join(found)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with the package, whose libraries have sanitizers in them."""
    runtime()
    folder = tmp_path_factory.mktemp("sanitized")
    setup = load_setup()
    setup.compiler = lambda: "g++"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "elmkernels", folder / "elmkernels", ignore=ignored)
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
    libraries = [setup.plan(name, setup.torch_root()) for name in HERE]
    for library in libraries:
        library.flags = [flag for flag in library.flags if flag != "-O3"] + flags
        library.link += SANITIZERS
    work = folder / "work"
    work.mkdir()
    _, failed = setup.compile_all(libraries, work)
    assert not failed, failed
    for library in libraries:
        library.finish(work, folder / "elmkernels" / f"_{library.name}.so")
    shutil.rmtree(work)
    return folder


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        # Python frees little at its end; the rest of a report goes to stderr.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return subprocess.run(
        [sys.executable, str(DRIVER), *arguments],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.parametrize("backend", HERE)
def test_clean(package, backend):
    done = run(package, backend)
    assert done.returncode == 0, done.stdout + done.stderr[:6000]
    assert len(done.stdout.splitlines()) == 3
    assert "runtime error" not in done.stderr and "Sanitizer" not in done.stderr


@pytest.mark.parametrize("where", ["heap", "stack"])
@pytest.mark.parametrize("backend", HERE)
def test_what_is_broken_is_found(package, backend, where):
    """The test above can fail."""
    done = run(package, backend, where)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr or "runtime error" in done.stderr
