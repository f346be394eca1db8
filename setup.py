"""Builds the compiled backends: one CPU library per instruction set, one CUDA library.

All are on torch's stable ABI: one binary serves every torch >= 2.10 and every Python. torch's
headers are found beside this Python's packages even in an isolated build, so that nothing is
downloaded to build. What can't be built is never an error: the reason goes to build_report.json,
and `elmkernels info` prints it.
"""

import ast
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10

# One row per instruction set: the same sources, other flags. avx512_bf16 pays where rows lie in a
# cache (benchmarks/results/instruction-sets-cpu). Every processor with bfloat16 has VNNI, which
# multiplies the bytes of activations="int8": no row of its own.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "avx512_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# The sources of csrc/cpu that a set needs, if not all of them: the rest of its backend is another's
# (BASES in elmkernels/backends.py). So few that parsing torch's headers beforehand costs more.
SOME_SOURCES = {"avx512_amx": ("attention.cpp", "amx/*.cpp")}
# Warnings are for who writes the kernels: g++ prints 100,000 lines about its own intrinsics.
CPU_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
# Half of a small source's compilation: parsed once for each instruction set.
PRECOMPILED = (
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/stable/library.h",
    "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
    "immintrin.h",
)
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
# "+PTX": what the driver of a newer GPU compiles for it.
CUDA_ARCHITECTURES = "8.0 9.0 10.0+PTX"
LEAST_CAPABILITY = 80
ARCH_LIST = "TORCH_CUDA_ARCH_LIST"  # torch's own variable, for all that is compiled for it


class BuildError(Exception):
    """Why one library was not built."""


def torch_root() -> Path | None:
    """The folder of the torch package this Python would import."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    roots = (Path(p) / "torch" for p in paths if p)
    return next((r for r in roots if (r / "include/torch/csrc/stable/library.h").is_file()), None)


def torch_facts(root: Path) -> dict[str, str | None]:
    """What torch/version.py says ({"__version__": "2.13.0+cpu", "cuda": None}), not importing it:
    in an isolated build torch's own requirements can't be imported.
    """
    facts = {}
    try:
        tree = ast.parse((root / "version.py").read_text())
    except (OSError, SyntaxError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            name = node.targets[0] if isinstance(node, ast.Assign) else node.target
            facts[getattr(name, "id", "")] = node.value.value
    return facts


def compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next((c for c in (*named[:1], "g++", "clang++", "c++") if shutil.which(c)), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin/nvcc"))


def version_of(tool: str) -> str:
    """The line of `--version` that holds the number."""
    done = subprocess.run([tool, "--version"], capture_output=True, text=True)
    lines = done.stdout.splitlines() or [tool]
    return next((x for x in lines if "release" in x), lines[0]).strip()


def architectures(asked: str) -> list[str]:
    """ "8.0;9.0a 10.0+PTX" as nvcc counts: ["80", "90", "100+PTX"], those the kernels are for.

    No kernel uses what belongs to one architecture alone (the "a" of "9.0a"): the plain code runs
    there too.
    """
    found = []
    for entry in filter(None, re.split(r"[\s;]+", asked)):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if match is None:
            raise BuildError(f'{ARCH_LIST} must be numbers such as "8.0 9.0+PTX", got {entry!r}')
        found.append(match[1] + match[2] + (match[3] or ""))
    fit = [a for a in found if int(a.partition("+")[0]) >= LEAST_CAPABILITY]
    if not fit:
        raise BuildError(f"the kernels need 8.0 or newer, {ARCH_LIST} is {asked!r}")
    return list(dict.fromkeys(fit))


def gencode(architecture: str) -> list[str]:
    """nvcc's options for "90", or for "90+PTX"."""
    number, _, ptx = architecture.partition("+")
    kinds = ("sm", "compute") if ptx else ("sm",)
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run: {error}") from error
    if done.returncode:
        print(shlex.join(command), done.stdout, done.stderr, sep="\n", file=sys.stderr)
        lines = [x for x in done.stderr.splitlines() if "error" in x.lower()]
        lines += [x for x in done.stderr.splitlines() if x.strip()][-1:]
        what = lines[0].strip()[:300] if lines else f"exit code {done.returncode} and no message"
        if not lines and os.environ.get("CXX"):
            what += "; set CXX to a C++ compiler"
        raise BuildError(f"{Path(command[0]).name} failed: {what}")


def say(text: str) -> None:
    """Shown by `pip install -v`, while it goes on."""
    print(f"elmkernels: {text}", flush=True)


@dataclass
class Library:
    """How one library is compiled."""

    name: str
    driver: str
    flags: list[str]
    link: list[str]
    sources: list[Path]
    what: str  # for a person: the instruction set, the architectures
    precompiled: bool = False  # whether the driver takes PRECOMPILED

    def object(self, source: Path, work: Path) -> Path:
        return work / f"{self.name}_{source.stem}.o"

    def precompile(self, work: Path) -> list[str]:
        """Compile torch's headers; the options that use them, none if the compiler can't."""
        header = work / f"{self.name}.h"
        header.write_text("".join(f"#include <{name}>\n" for name in PRECOMPILED))
        command = [self.driver, *self.flags, "-x", "c++-header", str(header)]
        try:
            run([*command, "-o", f"{header}.gch"])
        except BuildError:
            return []
        return ["-include", str(header)]

    def compile(self, source: Path, work: Path, precompiled: Future[list[str]] | None) -> float:
        """One object; returns the seconds it took."""
        options = precompiled.result() if precompiled else []
        start = time.perf_counter()
        target = ["-c", str(source), "-o", str(self.object(source, work))]
        run([self.driver, *self.flags, *options, *target])
        return time.perf_counter() - start

    def finish(self, work: Path, library: Path) -> None:
        """Link the objects, with the digest of their sources, and see that kernels are in them."""
        libraries = runpy.run_path(str(ROOT / "elmkernels/libraries.py"))
        stamp = work / f"{self.name}_stamp.cpp"
        stamp.write_text(libraries["stamp"](ROOT / "csrc", self.name))
        self.compile(stamp, work, None)
        objects = [str(self.object(source, work)) for source in self.sources]
        objects.append(str(self.object(stamp, work)))
        partial = library.with_suffix(".part")
        run([self.driver, "-shared", *objects, *self.link, "-o", str(partial)])
        if f"elmkernels_{self.name}\0".encode() not in partial.read_bytes():
            partial.unlink()
            raise BuildError(f"its sources register no kernel of elmkernels_{self.name}")
        partial.replace(library)


def plan(name: str, root: Path | None) -> Library:
    """How a library is built here; BuildError if it can't be."""
    if platform.system() != "Linux":
        raise BuildError(f"compiled kernels are built on Linux, this is {platform.system()}")
    if root is None:
        raise BuildError("torch >= 2.10 was not installed when elmkernels was built")
    asked = os.environ.get(ARCH_LIST, "").strip()
    if name == "cuda" and not (asked or torch_facts(root).get("cuda")):
        raise BuildError(
            f'this torch has no CUDA; set {ARCH_LIST}="{CUDA_ARCHITECTURES}" to build it anyway'
        )
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler was found; install g++ or clang++")
    suffix = "cu" if name == "cuda" else "cpp"
    folder = ROOT / "csrc" / ("cuda" if name == "cuda" else "cpu")
    patterns = SOME_SOURCES.get(name, (f"*.{suffix}",))
    sources = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not sources:
        raise BuildError(f"there are no sources in {folder}")
    flags = [TARGET, f"-DELMKERNELS_BACKEND=elmkernels_{name}"]
    flags += [f"-I{ROOT / 'csrc'}", "-isystem", str(root / "include")]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu"]
    if name == "cuda":
        driver = nvcc()
        if driver is None:
            raise BuildError("nvcc was not found; install the CUDA toolkit")
        chosen = architectures(asked or CUDA_ARCHITECTURES)
        codes = [code for a in chosen for code in gencode(a)]
        flags = [*CUDA_FLAGS, *codes, f"-ccbin={cxx}", "-DUSE_CUDA", *flags]
        # The CPU build of torch has no CUDA stream functions: a CUDA torch resolves them.
        link += ["-Xlinker=--unresolved-symbols=ignore-all", "-cudart=static"]
        return Library(name, driver, flags, link, sources, ", ".join(chosen))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise BuildError(f"needs an x86-64 processor, this is {platform.machine()}")
    flags = [*CPU_FLAGS, *INSTRUCTION_SETS[name], *flags]
    what = " ".join(INSTRUCTION_SETS[name])
    few = name in SOME_SOURCES
    return Library(name, cxx, flags, [*link, "-Wl,--no-as-needed"], sources, what, not few)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_all(plans: list[Library], work: Path) -> tuple[dict[str, float], dict[str, BuildError]]:
    """The objects of all libraries in one pool; the seconds of work for each, and what failed."""
    spent = {library.name: 0.0 for library in plans}
    failed = {}
    # A precompiled header has a hundred megabytes: gone when the objects are there.
    with tempfile.TemporaryDirectory(dir=work) as headers, ThreadPoolExecutor(cores()) as pool:
        ready = {
            library.name: pool.submit(library.precompile, Path(headers))
            for library in plans
            if library.precompiled
        }
        # nvcc takes longest, then the longest source: no core waits for the last one.
        todo = [(library, source) for library in plans for source in library.sources]
        todo.sort(key=lambda job: (job[0].precompiled, -job[1].stat().st_size))
        jobs = {
            pool.submit(library.compile, source, work, ready.get(library.name)): (library, source)
            for library, source in todo
        }
        for count, job in enumerate(as_completed(jobs), 1):
            library, source = jobs[job]
            try:
                seconds = job.result()
            except BuildError as error:
                failed[library.name] = error
                continue
            spent[library.name] += seconds
            say(f"[{count}/{len(jobs)}] {library.name}: {source.name}, {seconds:.1f} s")
    return spent, failed


def described(built: list[Library], torch: Path, spent: dict[str, float], took: float) -> dict:
    """What was built with what and in which time, for the report."""
    found = {f"{x.name} architectures": x.what for x in built if x.name == "cuda"}
    found["compilers"] = "; ".join(version_of(d) for d in dict.fromkeys(x.driver for x in built))
    found["torch's headers"] = torch_facts(torch).get("__version__") or str(torch)
    each = ", ".join(f"{x.name} {spent[x.name]:.0f} s" for x in built)
    found["compiled in"] = f"{took:.0f} s on {cores()} cores ({each} of work)"
    return found


def build(package: Path, work: Path) -> dict[str, str]:
    """Every library that can be built here, into a package; {library: "built" or why not}, and
    with what.
    """
    start = time.perf_counter()
    root = torch_root()
    report, plans = {}, []
    for name in (*INSTRUCTION_SETS, "cuda"):
        try:
            library = plan(name, root)
        except BuildError as error:
            report[name] = f"not built: {error}"
            continue
        plans.append(library)
        hint = f"; minutes: {ARCH_LIST} narrows them" if name == "cuda" else ""
        say(f"{name}: compiling {len(library.sources)} files for {library.what}{hint}")
    spent, failed = compile_all(plans, work)
    for library in plans:
        try:
            if library.name in failed:
                raise failed[library.name]
            library.finish(work, package / f"_{library.name}.so")
            report[library.name] = "built"
        except BuildError as error:
            report[library.name] = f"not built: {error}"
    report = {name: report[name] for name in (*INSTRUCTION_SETS, "cuda")}
    for name, state in report.items():
        if state != "built":
            (package / f"_{name}.so").unlink(missing_ok=True)
        say(f"{name}: {state}")
    built = [library for library in plans if report[library.name] == "built"]
    if built and root:
        report |= described(built, root, spent, time.perf_counter() - start)
        say(f"compiled in {report['compiled in']} by {report['compilers']}")
    return report


class BuildKernels(build_ext):
    """Compiles every library of the table; records "built" or the reason for each."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in the binary, none in its name

    def run(self) -> None:
        package = Path(ROOT if self.inplace else self.build_lib) / "elmkernels"
        work = Path(self.build_temp)
        for folder in (package, work):
            folder.mkdir(parents=True, exist_ok=True)
        report = build(package, work)
        (package / "build_report.json").write_text(json.dumps(report, indent=1) + "\n")

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


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("elmkernels._kernels", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
    )
