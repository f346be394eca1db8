"""Installing: an sdist builds what a clone builds, and one wheel serves every torch."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from elmkernels import libraries

pytestmark = pytest.mark.slow

ROOT = libraries.PACKAGE.parent
# The oldest torch of the stable ABI and the newest that pip finds; each is gigabytes to download.
TORCHES = ["torch==2.10.0", "torch"]

LOADS = """
import json, torch, elmkernels
from elmkernels.backends import BACKENDS, build_report, missing_kernels
from elmkernels.testing import run_parity

assert missing_kernels("cpu") is None, missing_kernels("cpu")
records = run_parity(["rms_norm", "swiglu", "linear"], ["float32", "bfloat16"])
sizes = {"num_transformer_layers": 2, "model_dim": 256, "vocab_size": 512}
config = elmkernels.OpenELMConfig.from_name("OpenELM-270M", **sizes)
model = elmkernels.OpenELM.from_config(config).eval()
plain = elmkernels.generate(model, [[1, 2, 3]], 8)
elmkernels.accelerate(model)
assert elmkernels.generate(model, [[1, 2, 3]], 8) == plain
print(json.dumps({
    "torch": torch.__version__,
    "package": elmkernels.__file__,
    "report": build_report(),
    "missing": {name: b.missing for name, b in BACKENDS.items()},
    "failed": [r.row() for r in records if not r.ok],
    "run": sorted({r.backend for r in records}),
}))
"""


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """All that a command prints; it must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy, so that no folder of a build is left in the clone."""
    folder = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("elmkernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    run(sys.executable, "setup.py", "-q", "sdist", folder=folder)
    (archive,) = (folder / "dist").iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist with the torch of this Python, as `pip install` of it does."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--no-cache-dir", "wheel", "-v", "-w", folder, sdist]
    said = run(*pip, "--no-build-isolation", "--no-deps", folder=folder)
    assert re.search(r"elmkernels: \[\d+/\d+\] avx2: \S+\.cpp, \d+\.\d s", said)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_of_an_sdist_holds_the_libraries_and_no_sources(wheel):
    assert re.fullmatch(r"elmkernels-[\d.]+-py3-none-linux_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        report = json.loads(archive.read("elmkernels/build_report.json"))
    held = {name for name in names if name.endswith(".so")}
    sets = {"avx2", "avx512", "avx512_bf16", "avx512_amx"}
    assert {report[name] for name in sets} == {"built"}
    cuda = {"cuda"} if report["cuda"] == "built" else set()
    assert held == {f"elmkernels/_{name}.so" for name in sets | cuda}
    assert {"elmkernels/py.typed", "elmkernels/training/recipes/tiny.yaml"} <= names
    assert not [n for n in names if n.startswith(("csrc", "tests", "benchmarks", "build"))]


def loaded(python: str | Path, folder: Path, **environment: str) -> dict:
    found = json.loads(run(python, "-c", LOADS, folder=folder, **environment).splitlines()[-1])
    here = {name for name, why in found["missing"].items() if why is None}
    sets = {"avx2", "avx512", "avx512_bf16", "avx512_amx"} & here
    assert sets, found["missing"]
    assert found["failed"] == []
    assert sets <= set(found["run"])
    for name in {"avx2", "avx512", "avx512_bf16", "avx512_amx"} - here:
        assert "this processor has no" in found["missing"][name]
    return found


def test_it_runs_under_this_torch(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run(*pip, "--target", tmp_path / "site", wheel, folder=tmp_path)
    found = loaded(sys.executable, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert found["package"].startswith(str(tmp_path))
    assert found["torch"] == torch.__version__


@pytest.mark.parametrize("wanted", TORCHES)
def test_it_runs_under_another_torch(wheel, tmp_path, wanted):
    run(sys.executable, "-m", "venv", tmp_path / "env", folder=tmp_path)
    python = tmp_path / "env/bin/python"
    command = [python, "-m", "pip", "install", "-q", wanted, "numpy", "safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{wanted} can't be installed: {done.stderr.strip().splitlines()[-1][:200]}")
    run(python, "-m", "pip", "install", "-q", "--no-index", wheel, folder=tmp_path)
    found = loaded(python, tmp_path)
    assert found["package"].startswith(str(tmp_path))
    if "==" in wanted:
        assert found["torch"].startswith(wanted.partition("==")[2])


def test_an_editable_install_is_found_from_beside_its_clone(sdist, tmp_path):
    """There the clone's own folder has the package's name, and is none."""
    shutil.unpack_archive(sdist, tmp_path)
    (clone,) = tmp_path.iterdir()
    clone = clone.rename(tmp_path / "elmkernels")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", folder=tmp_path)
    python = tmp_path / "env/bin/python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps"]
    site = {"PYTHONPATH": sysconfig.get_path("purelib")}
    run(*pip, "--no-build-isolation", "-e", clone, folder=tmp_path, CXX="false", **site)
    said = run(python, "-c", "from elmkernels import OpenELM", folder=tmp_path, **site)
    assert said == ""
