"""What is said where a library is missing or damaged, and what can mend it."""

import runpy
from types import SimpleNamespace

import pytest

from elmkernels import libraries
from elmkernels.cli.main import main

CPU_LIBRARIES = [path for path in libraries.PACKAGE.glob("_*.so") if path.stem != "_cuda"]


@pytest.mark.parametrize(
    ("reason", "ends"),
    [
        ("not built: no C++ compiler was found; install g++ or clang++", ", then: pip"),
        ("not built: nvcc was not found; install the CUDA toolkit", ", then: pip"),
        ('not built: this torch has no CUDA; set X="8.0" to build it anyway', ", then: pip"),
        ("not built: false failed: exit code 1 and no message; set CXX to a C++", ", then: pip"),
        ("not built: torch >= 2.10 was not installed", "; reinstall with: pip"),
        ("_avx2.so is gone", "; reinstall with: pip"),
        ("not built: compiled kernels are built on Linux, this is Darwin", None),
        ("not built: needs an x86-64 processor, this is aarch64", None),
    ],
)
def test_a_remedy_that_can_help(reason, ends):
    """No circle: what would fail again isn't advised."""
    said = libraries._mended(reason)
    assert said == reason if ends is None else said.startswith(f"{reason}{ends} install ")


@pytest.mark.parametrize("cxx", ["/bin/false", "false -O2"])
def test_a_compiler_that_says_nothing(monkeypatch, cxx):
    setup_py = SimpleNamespace(**runpy.run_path(str(libraries.PACKAGE.parent / "setup.py")))
    monkeypatch.setenv("CXX", cxx)
    assert setup_py.compiler() == cxx.split()[0]
    said = "false failed: exit code 1 and no message; set CXX to a C\\+\\+ compiler"
    with pytest.raises(setup_py.BuildError, match=f"^{said}$"):
        setup_py.run([setup_py.compiler(), "-c", "any.cpp"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"avx2": 1}', '"built"', "\xff", "[" * 100_000])
def test_a_damaged_report(monkeypatch, tmp_path, capsys, text):
    report = tmp_path / "build_report.json"
    report.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(libraries, "REPORT", report)
    found = libraries.build_report()
    assert list(found) == ["build_report.json"]
    assert found["build_report.json"].startswith("damaged: what was built isn't known; reinstall")
    assert main(["info", "--device", "cpu"]) == 0
    assert "build_report.json damaged: " in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_truncated_library_is_damaged_not_old(monkeypatch, tmp_path, size):
    if not CPU_LIBRARIES or not libraries.SOURCES.is_dir():
        pytest.skip("no CPU library is built here")
    monkeypatch.setattr(libraries, "PACKAGE", tmp_path)
    (tmp_path / "_avx2.so").write_bytes(CPU_LIBRARIES[0].read_bytes()[:size])
    assert libraries.load("avx2").startswith(
        "_avx2.so is damaged: it doesn't say what it was built from; reinstall with: pip install "
    )
