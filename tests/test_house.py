"""The house rules, kept by walking the sources: who imports whom, one name in every room, sizes."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elmkernels.backends import HAS_ONLY, defined
from elmkernels.testing import CASES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "elmkernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = {
    "rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu", "attention", "linear", "decode_step",
    "linear_cross_entropy",
}  # fmt: skip

MODEL = {
    "openelm", "ops", "reference", "checks", "weights", "compress", "backends", "formats", "gpu",
}  # fmt: skip
# Which of our rooms a room may import; the longest prefix of a module's name decides.
MAY_IMPORT = {
    "formats": set(),
    "reference": {"reference", "formats"},
    "triton": {"triton"},
    "checks": set(),
    "weights": {"checks", "formats"},
    "compress": {"compress", "formats"},
    "libraries": set(),
    "backends": {"libraries"},
    "gpu": {"backends"},
    "chunked_loss": {"backends", "checks"},
    "ops": {"ops", "backends", "checks", "chunked_loss", "weights", "reference", "formats"},
    "openelm.config": set(),
    "openelm": MODEL,
    "testing": {
        "testing",
        "ops",
        "reference",
        "backends",
        "gpu",
        "openelm.config",
        "formats",
        "compress",
    },
    "training": {"training", "openelm", "checks"},
    "training.speed": {"openelm", "testing"},
    "commands": {
        "commands",
        "console",
        "openelm",
        "formats",
        "testing",
        "backends",
        "training",
        "__version__",
    },  # fmt: skip
    # The model's own proof and measurements hold it to the same rules and clocks as the ops.
    **dict.fromkeys(
        (
            "openelm.proof",
            "openelm.speed",
            "openelm.job",
            "openelm.race",
            "openelm.race_figures",
            "openelm.step_race",
            "openelm.fair",
            "openelm.gpu_check",
            "openelm.gpu_generation",
            "openelm.gpu_held",
            "openelm.gpu_models",
            "openelm.gpu_report",
        ),
        MODEL | {"testing"},
    ),
}
ANYTHING = {"__init__", "__main__", "console"}
# What may be imported when a module is: the core dependencies, and Triton by its kernels.
CORE = {"torch", "numpy", "safetensors"}

TOP_LEVEL = {
    ".ci", ".clang-format", ".gitignore", ".pre-commit-config.yaml", "LICENSE", "MANIFEST.in",
    "README.md", "benchmarks", "csrc", "elmkernels", "pyproject.toml", "setup.py", "tests",
}  # fmt: skip


def module_name(path: Path) -> str:
    """ops.rms_norm for elmkernels/ops/rms_norm.py, ops for a room's __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def in_room(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def imports(path: Path, late: bool = True) -> set[str]:
    """Full names of the modules a source imports; without `late`, those inside functions not."""
    tree = ast.parse(path.read_text())
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = ["elmkernels", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if not late and node in inner:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {base if node.module else f"{base}.{alias.name}" for alias in node.names}
            if node.module and base.startswith("elmkernels"):
                # `from .. import ops` and `from ..ops import rms_norm` both name the room.
                found |= {f"{base}.{a.name}" for a in node.names if is_module(base, a.name)}
    return found


def is_module(base: str, name: str) -> bool:
    folder = ROOT.joinpath(*base.split("."))
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def ours(path: Path) -> set[str]:
    names = {n for n in imports(path) if n == "elmkernels" or n.startswith("elmkernels.")}
    return {n.removeprefix("elmkernels").removeprefix(".") for n in names}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_who_imports_whom(path):
    name = module_name(path)
    if name in ANYTHING:
        return
    rooms = [room for room in MAY_IMPORT if in_room(name, room)]
    assert rooms, f"{name} is in no room: extend the table or move it"
    allowed = MAY_IMPORT[max(rooms, key=len)]
    for imported in ours(path):
        assert any(in_room(imported, room) for room in allowed), f"{name} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_extras_are_imported_late(path):
    top = {name.partition(".")[0] for name in imports(path, late=False)}
    allowed = CORE | set(sys.stdlib_module_names) | {"elmkernels"}
    if in_room(module_name(path), "triton"):
        allowed |= {"triton"}
    assert top <= allowed, f"imported by loading the module: {sorted(top - allowed)}"


# Where each op lives: the specification everywhere, kernels where the dispatch expects them.
ROOMS = {
    "elmkernels/reference/*.py": OPS,
    "elmkernels/ops/*.py": OPS,
    "benchmarks/ops/bench_*.py": OPS,
    "csrc/cpu/*.cpp": set(defined()),
    "csrc/cuda/*.cu": set(HAS_ONLY["cuda"]),
    "elmkernels/triton/*.py": set(HAS_ONLY["triton"]),
}


@pytest.mark.parametrize("pattern", ROOMS)
def test_one_op_has_the_same_name_in_every_room(pattern):
    names = {path.stem.removeprefix("bench_") for path in ROOT.glob(pattern)}
    names = {name for name in names if not name.startswith("_")}  # parts of one op
    assert names - {"common"} == ROOMS[pattern]


def test_every_op_has_cases_and_the_dispatch_knows_no_other():
    assert set(CASES) == OPS
    assert set(defined()) <= OPS


LIMITS = {
    "ops/qk_norm_rope.py": 220,
    "ops/attention.py": 180,
    "ops/linear_cross_entropy.py": 160,
    "ops/decode_step.py": 190,
}


def limit(path: Path) -> int:
    room = "tests" if ROOT / "tests" in path.parents else path.parent.name
    return LIMITS.get(f"{room}/{path.name}", {"ops": 150, "reference": 60}.get(room, 450))


CODE = [
    *SOURCES,
    *(p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_files_stay_short_and_narrow(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= limit(path)
    assert max(map(len, lines), default=0) <= 100


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_modules_are_described_and_validate_by_raising(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert vanishes under -O"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in (
                "Exception",
                "BaseException",
            )
            assert not (broad and all(isinstance(s, ast.Pass) for s in node.body)), node.lineno


def test_environment_variables_are_read_in_two_places_only():
    """Triton's own switch in backends; the toolchain's in setup.py. None is ours."""
    reading = {relative(p) for p in SOURCES if re.search(r"\benviron\b|\bgetenv\b", p.read_text())}
    assert reading <= {"elmkernels/backends.py"}
    assert set(re.findall(r'environ\.get\("(\w+)"', (PACKAGE / "backends.py").read_text())) == {
        "TRITON_INTERPRET"
    }
    named = set(re.findall(r"environ\.get\(([^,)]+)", (ROOT / "setup.py").read_text()))
    assert named == {'"CXX"', '"CUDA_HOME"', '"CUDA_PATH"', "ARCH_LIST"}


def test_all_tolerance_of_the_ops_is_in_parity():
    for path in (ROOT / "tests/ops").glob("*.py"):
        assert not re.search(r"\b[ar]tol\s*=", path.read_text()), path.name


def test_the_top_level_holds_what_was_agreed():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project isn't known")
    listed = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


ALONE = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it now fails, finding it gives nothing
before = set(sys.modules)
import torch
import elmkernels
from elmkernels import backends
x, w = torch.randn(3, 8), torch.rand(8)
assert torch.equal(elmkernels.rms_norm(x, w), elmkernels.reference.rms_norm(x, w)) or {built}
print(*sorted(name for name, b in backends.BACKENDS.items() if b.missing is None))
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({watched!r})))
"""


def run_alone(folder: Path, blocked: list[str], watched: list[str], built: bool) -> list[str]:
    script = ALONE.format(blocked=blocked, watched=watched, built=built)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


EXTRAS = ["triton", "matplotlib", "tqdm", "yaml", "transformers", "liger_kernel", "pytest"]
EXTRAS += ["tokenizers", "sentencepiece", "datasets", "tensorboard"]


def test_import_loads_no_extra():
    loaded = run_alone(ROOT, [], ["triton", "matplotlib", "transformers", "safetensors"], True)[1]
    assert loaded == ""


def test_import_works_with_torch_alone_and_nothing_built(tmp_path):
    shutil.copytree(
        PACKAGE,
        tmp_path / "elmkernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "build_report.json"),
    )
    usable, _ = run_alone(tmp_path, [*EXTRAS, "safetensors"], [], False)
    assert usable == "reference sdpa"
