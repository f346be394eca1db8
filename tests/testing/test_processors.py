"""Parity as other processors would have it: torch and its libraries take the code of other
instruction sets, or of a vendor's own processors, in a process of its own for each.

What differs is the order and the accuracy of the reference's sums, and thereby its yardstick; the
kernels are the same. Where a library doesn't know a switch, its run is one more of the plain ones.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# MKL asks this function of its own whether it is on an Intel processor, and takes its slower,
# otherwise ordered code if not.
INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "no-avx": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "intel": {"LD_PRELOAD": "intel"},
    "intel-avx2": {"LD_PRELOAD": "intel", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "threads": {"OMP_NUM_THREADS": "2"},
}
PRODUCTS = """
import torch
x = torch.randn(40, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
print((x @ x.T).double().sum().item(), x.sum(1).double().sum().item())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a setting."""
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        pytest.skip("no C compiler was found")
    folder = tmp_path_factory.mktemp("intel")
    (folder / "intel.c").write_text(INTEL)
    library = str(folder / "intel.so")
    subprocess.run([cc, "-shared", "-fPIC", str(folder / "intel.c"), "-o", library], check=True)

    def of(setting: str) -> dict[str, str]:
        changed = {k: library if v == "intel" else v for k, v in SETTINGS[setting].items()}
        return {**os.environ, "OMP_NUM_THREADS": "1", **changed}

    return of


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_settings_change_the_order_of_sums(environment):
    assert len({run(environment(name), "-c", PRODUCTS) for name in SETTINGS}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("interpreted", "which"),
    [("0", "not large"), ("1", "triton-cpu and float32 and attention-")],
    ids=["compiled", "interpreted"],
)
def test_every_case_has_parity(environment, setting, interpreted, which):
    path = str(ROOT / "tests" / "ops" / "test_parity.py")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", which)
    out = run({**environment(setting), "TRITON_INTERPRET": interpreted}, *arguments)
    assert " passed" in out, out


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_mutations_are_found(environment, setting):
    names = ("test_mutations.py", "test_equivalent.py")
    paths = (str(Path(__file__).with_name(name)) for name in names)
    assert " passed" in run(
        environment(setting), "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths
    )
