"""The compiled libraries: one binary for every torch and every Python, with nothing of either."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from elmkernels import backends, libraries
from elmkernels.backends import BACKENDS, build_report
from elmkernels.libraries import PACKAGE

ROOT = PACKAGE.parent
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
    # What every manylinux machine has, and torch's library, which its package brings. Not OpenMP's,
    # CUDA's or Python's: torch has its own.
    allowed = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    allowed |= {"librt.so.1", "libdl.so.2", "ld-linux-x86-64.so.2", "libtorch_cpu.so"}
    assert needed and set(needed) <= allowed


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


@built
def test_every_library_says_what_it_was_built_from():
    """In a clone a library that is older than its sources isn't loaded."""
    for library in LIBRARIES:
        name = library.stem.removeprefix("_")
        why = f"{library.name} is older than csrc: build it again"
        assert libraries.out_of_date(name) is None, why


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


@pytest.fixture
def setup_py() -> ModuleType:
    """setup.py as a module: nothing is set up by importing it."""
    spec = importlib.util.spec_from_file_location("elmkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def a_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that lays out a torch package of some CUDA version; no TORCH_CUDA_ARCH_LIST."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def make(cuda: str | None) -> Path:
        header = tmp_path / "site/torch/include/torch/csrc/stable/library.h"
        header.parent.mkdir(parents=True)
        header.write_text("")
        root = tmp_path / "site/torch"
        version = f"__version__ = '2.12.0'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
        (root / "version.py").write_text(f"from typing import Optional\n\n{version}")
        return root

    return make


def tools(folder: Path, *names: str) -> str:
    """A folder for the PATH with programs that do nothing."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_cuda_is_compiled_where_torch_has_it_or_on_request(
    setup_py, a_torch, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "g++", "nvcc"))
    without = a_torch(None)
    with pytest.raises(setup_py.BuildError, match='no CUDA; set TORCH_CUDA_ARCH_LIST="8.0 9.0'):
        setup_py.plan("cuda", without)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    asked = setup_py.plan("cuda", without)
    assert asked.what == "90"
    assert [f for f in asked.flags if "gencode" in f] == ["-gencode=arch=compute_90,code=sm_90"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    shutil.rmtree(without)
    assert setup_py.plan("cuda", a_torch("12.8")).what == "80, 90, 100+PTX"


def test_the_facts_of_torch_are_read_without_importing_it(setup_py):
    facts = setup_py.torch_facts(setup_py.torch_root())
    assert facts["__version__"] == torch.__version__
    assert facts["cuda"] == torch.version.cuda


@pytest.mark.parametrize(
    "asked, found",
    [
        ("8.0;9.0", ["80", "90"]),
        ("8.0 9.0+PTX", ["80", "90+PTX"]),
        ("9.0a", ["90"]),
        (" 8.6 ; 12.0f+PTX 8.6", ["86", "120+PTX"]),
        ("5.0 7.5 8.0", ["80"]),  # the others can't run the kernels
    ],
)
def test_architectures_as_torch_writes_them(setup_py, asked, found):
    assert setup_py.architectures(asked) == found


@pytest.mark.parametrize("asked, said", [("Hopper", "'Hopper'"), ("80", "'80'"), ("7.5", "8.0 or")])
def test_architectures_that_are_refused(setup_py, asked, said):
    with pytest.raises(setup_py.BuildError, match=said):
        setup_py.architectures(asked)


def copied(folder: Path, sources: str = "") -> Path:
    """The package alone, with nothing built, and setup.py; csrc/cpu of one source, if given."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build_report.json")
    shutil.copytree(PACKAGE, folder / "elmkernels", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    if sources:
        (folder / "csrc/cpu").mkdir(parents=True)
        (folder / "csrc/cpu/kernels.cpp").write_text(sources)
    return folder


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_without_sources_nothing_is_called_built(tmp_path):
    done = python(copied(tmp_path), "setup.py", "-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "elmkernels/build_report.json").read_text())
    assert set(report) == {"avx2", "avx512", "avx512_bf16", "avx512_amx", "cuda"}
    assert all(state.startswith("not built: ") for state in report.values())
    assert "there are no sources in" in report["avx2"]
    assert "elmkernels: avx2: not built: there are no sources" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


SEES = """
import torch, elmkernels
from elmkernels import backends
print(backends.missing_kernels("cpu"))
x = torch.randn(3, 8)
assert torch.equal(elmkernels.swiglu(x), elmkernels.reference.swiglu(x))
try:
    elmkernels.swiglu(x, backend="avx2")
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_it_installs_and_says_what_to_do(tmp_path):
    copied(tmp_path, "int f() { return 1; }\n")
    empty = tools(tmp_path / "bin")
    done = python(tmp_path, "setup.py", "-q", "build_ext", "--inplace", PATH=empty, CXX="")
    assert done.returncode == 0, done.stderr
    said = python(tmp_path, "-c", SEES).stdout.splitlines()
    assert len(said) == 2
    assert said[0].startswith("no compiled kernels: ")
    if torch.cpu._is_avx2_supported():
        why = "not built: no C++ compiler was found; install g++ or clang++"
        command = f"pip install --no-deps -e {tmp_path}"
        assert said[0] == f"no compiled kernels: {why}, then: {command}"
        assert said[1] == f"backend 'avx2' can't run here: {why}, then: {command}"


def test_without_torch_the_import_says_what_to_do(tmp_path):
    copied(tmp_path)
    done = python(tmp_path, "-c", "import sys; sys.modules['torch'] = None; import elmkernels")
    last = done.stderr.splitlines()[-1]
    said = "elmkernels needs torch >= 2.10, which is not installed: pip install torch"
    assert last == f"ImportError: {said}"


ONE_KERNEL = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;
Tensor first(const Tensor& x, const Tensor&, double) { return x; }

#define REGISTER_(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m)
#define REGISTER(ns, m) REGISTER_(ns, m)
REGISTER(ELMKERNELS_BACKEND, m) { m.impl("rms_norm_fwd", TORCH_BOX(&first)); }
"""


@pytest.fixture
def compiled_in(setup_py, monkeypatch):
    """A function that builds the AVX2 library in a folder with setup.py's own steps."""
    if setup_py.torch_root() is None or setup_py.compiler() is None:
        pytest.skip("no C++ compiler, or no headers of torch")
    if not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    # For one small source the headers aren't worth it.
    monkeypatch.setattr(setup_py, "INSTRUCTION_SETS", {"avx2": setup_py.INSTRUCTION_SETS["avx2"]})
    monkeypatch.setattr(setup_py.Library, "precompile", lambda self, work: [])

    def build(folder: Path) -> dict[str, str]:
        monkeypatch.setattr(setup_py, "ROOT", folder)
        (folder / "work").mkdir()
        return setup_py.build(folder / "elmkernels", folder / "work")

    return build


def test_a_library_that_registers_nothing_is_not_built(compiled_in, tmp_path):
    report = compiled_in(copied(tmp_path, "int f() { return 1; }\n"))
    assert report["avx2"] == "not built: its sources register no kernel of elmkernels_avx2"
    assert not list(tmp_path.rglob("*.so"))


def test_a_source_that_fails_is_named(compiled_in, tmp_path):
    report = compiled_in(copied(tmp_path, "int f() { return missing; }\n"))
    assert re.match(r"not built: \S+ failed: .*kernels\.cpp.*missing", report["avx2"])
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_that_lacks_an_op_or_is_out_of_date_is_not_used(compiled_in, tmp_path):
    assert compiled_in(copied(tmp_path, ONE_KERNEL))["avx2"] == "built"
    said = python(tmp_path, "-c", SEES)
    reinstall = f"reinstall with: pip install --no-deps -e {tmp_path}"
    assert said.returncode == 0, said.stderr
    lacks, refused = said.stdout.splitlines()
    match = re.fullmatch(r"no compiled kernels: _avx2\.so has no kernel (\w+); (.*)", lacks)
    assert match and match[1] != "rms_norm_fwd" and match[2] == reinstall
    assert (
        refused == f"backend 'avx2' can't run here: _avx2.so has no kernel {match[1]}; {reinstall}"
    )
    source = tmp_path / "csrc/cpu/kernels.cpp"
    source.write_text(ONE_KERNEL.replace("return x", "return  x  /* */"))
    said = python(tmp_path, "-c", SEES).stdout
    assert f"_avx2.so is out of date: {tmp_path / 'csrc'} has changed since it was built" in said


def test_what_a_library_is_built_from(tmp_path):
    digest = libraries.digest.__wrapped__
    for name in ("cpu/a.cpp", "cuda/b.cu", "shared/c.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("int f();\n")
    before = {name: digest(tmp_path, name) for name in ("cpu", "cuda")}

    def changed() -> set[str]:
        return {name for name in before if digest(tmp_path, name) != before[name]}

    (tmp_path / "cpu/a.cpp").write_text("// a comment\n  int f();  // another\n")
    (tmp_path / "cpu/a.cpp.orig").write_text("int g();\n")
    assert changed() == set()
    (tmp_path / "cpu/a.cpp").write_text("int g();\n")
    assert changed() == {"cpu"}
    (tmp_path / "shared/c.h").rename(tmp_path / "shared/d.h")
    assert changed() == {"cpu", "cuda"}


def test_how_to_install_again(tmp_path, monkeypatch):
    assert libraries.reinstall() == f"pip install --no-deps -e {ROOT}"

    def taken_from(text: str) -> str:
        info = tmp_path / "elmkernels-1.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Name: elmkernels\nVersion: 1\n")
        (info / "direct_url.json").write_text(text)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        return libraries.reinstall().removeprefix(
            "pip install --force-reinstall --no-deps --no-cache-dir "
        )

    monkeypatch.setattr(libraries, "SOURCES", tmp_path / "csrc")  # not in a clone
    assert taken_from("{}") == taken_from("") == "elmkernels"
    sdist = "file:///tmp/elmkernels-0.1.0.tar.gz"
    assert taken_from(json.dumps({"url": sdist})) == sdist
    commit = {"url": "https://host/e.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert taken_from(json.dumps(commit)) == "git+https://host/e.git@abc"


def test_missing_kernels_names_what_is_missing(monkeypatch):
    found = {b.name: None if "cpu" in b.devices else "no GPU" for b in BACKENDS.values()}

    def said(device: str, **missing: str | None) -> str | None:
        table = {
            b.name: backends.replace(b, missing=(found | missing)[b.name])
            for b in BACKENDS.values()
        }
        monkeypatch.setattr(backends, "BACKENDS", table)
        return backends.missing_kernels(device)

    few = {"avx512_bf16": "this processor has no AVX-512", "avx512": "too old a compiler"}
    few |= {"avx512_amx": "this processor has no AMX"}
    assert said("cpu") is said("cpu", **few) is None  # one is enough
    assert said("cpu", **few, avx2="not built: x") == "no compiled kernels: not built: x"
    assert said("cuda") == "no compiled kernels: no GPU"
    assert said("cuda", triton=None) is None
    assert said("cuda", cuda="y", triton="z") == "no compiled kernels: z; y"
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'mps'"):
        said("mps")


def test_an_sdist_holds_the_sources_and_nothing_built(tmp_path):
    copied(tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for stale in ("elmkernels/_avx2.so", "elmkernels/build_report.json", "csrc/cpu/old.so"):
        (tmp_path / stale).write_text("stale")
    done = python(tmp_path, "setup.py", "-q", "sdist", "--formats=gztar")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()

    def held(folder: Path) -> set[str]:
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        return {f for f in files if "__pycache__" not in f and f.startswith(("csrc", "elmk"))}

    built = {"elmkernels/_avx2.so", "elmkernels/build_report.json", "csrc/cpu/old.so"}
    expected = {f for f in held(tmp_path) - built if ".egg-info" not in f}
    assert {f for f in held(unpacked) if ".egg-info" not in f} == expected
    assert {"elmkernels/py.typed", "elmkernels/training/recipes/tiny.yaml"} <= expected
    assert (unpacked / "setup.py").is_file()
