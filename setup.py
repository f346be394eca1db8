"""Builds the compiled backends: one CPU library per instruction set, one CUDA library.

All are on torch's stable ABI: one binary serves every torch >= 2.10 and every Python. torch's
headers are found beside this Python's packages even in an isolated build, so that nothing is
downloaded to build. What can't be built is never an error: the reason goes to build_report.json,
and `elmkernels info` prints it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10

# One row per instruction set: the same sources, other flags. avx512_bf16 pays where rows lie in a
# cache (benchmarks/results/instruction-sets-cpu). A vnni row wouldn't: no kernel here multiplies
# integers.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
CPU_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
# "+PTX": what the driver of a newer GPU compiles for it.
CUDA_ARCHITECTURES = ("80", "90", "100+PTX")
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]


def torch_root() -> Path | None:
    """The folder of the torch package this Python would import."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    roots = (Path(p) / "torch" for p in paths if p)
    return next((r for r in roots if (r / "include/torch/csrc/stable/library.h").is_file()), None)


def compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next((c for c in (*named[:1], "g++", "clang++", "c++") if shutil.which(c)), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin/nvcc"))


class BuildError(Exception):
    """Why one library was not built."""


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run: {error}") from error
    if done.returncode:
        print(" ".join(command), done.stdout, done.stderr, sep="\n", file=sys.stderr)
        lines = [x for x in done.stderr.splitlines() if "error" in x.lower()] or ["no message"]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0].strip()[:300]}")


def gencode(architecture: str) -> list[str]:
    """nvcc's options for "90", or for "90+PTX"."""
    number, _, ptx = architecture.partition("+")
    kinds = ("sm", "compute") if ptx else ("sm",)
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


class BuildKernels(build_ext):
    """Compiles every library of the table; records "built" or the reason for each."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in the binary, none in its name

    def run(self) -> None:
        package = Path(ROOT if self.inplace else self.build_lib) / "elmkernels"
        package.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        report = {}
        for name in (*INSTRUCTION_SETS, "cuda"):
            library = package / f"_{name}.so"
            library.unlink(missing_ok=True)
            try:
                self.compile(name, work, library)
                report[name] = "built"
            except BuildError as error:
                report[name] = str(error)
            print(f"elmkernels: {name}: {report[name]}")
        if report["cuda"] == "built":
            report["cuda architectures"] = ", ".join(CUDA_ARCHITECTURES)
        (package / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")

    def compile(self, name: str, work: Path, library: Path) -> None:
        if platform.system() != "Linux":
            raise BuildError(f"compiled kernels are built on Linux, this is {platform.system()}")
        torch = torch_root()
        if torch is None:
            raise BuildError("torch >= 2.10 was not installed when elmkernels was built")
        cxx = compiler()
        if cxx is None:
            raise BuildError("no C++ compiler was found (g++ or clang++)")
        if name == "cuda":
            driver = [nvcc() or ""]
            if not driver[0]:
                raise BuildError("nvcc was not found")
            codes = [code for a in CUDA_ARCHITECTURES for code in gencode(a)]
            flags = [*CUDA_FLAGS, *codes, f"-ccbin={cxx}", "-DUSE_CUDA"]
            sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
            if not sources:
                raise BuildError("there are no CUDA sources")
        else:
            if platform.machine().lower() not in ("x86_64", "amd64"):
                raise BuildError(f"needs an x86-64 processor, this is {platform.machine()}")
            driver, flags = [cxx], [*CPU_FLAGS, *INSTRUCTION_SETS[name]]
            sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        flags += [TARGET, f"-DELMKERNELS_BACKEND=elmkernels_{name}"]
        flags += [f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]
        objects = [work / f"{name}_{source.stem}.o" for source in sources]
        commands = [
            [*driver, *flags, "-c", str(source), "-o", str(obj)]
            for source, obj in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        link = [str(o) for o in objects] + [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if name == "cuda":
            # The CPU build of torch has no CUDA stream functions: a CUDA torch resolves them.
            link += ["-Xlinker=--unresolved-symbols=ignore-all", "-cudart=static"]
        else:
            link += ["-Wl,--no-as-needed"]
        partial = library.with_suffix(".part")
        run([*driver, "-shared", *link, "-o", str(partial)])
        partial.replace(library)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "elmkernels"
        return [str(p) for p in package.glob("*.so")] + [str(package / "build_report.json")]


try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel


class AnyPython(bdist_wheel):
    """The libraries hold no Python symbol: one wheel for every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("elmkernels._kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
