"""The house rules, kept by walking the sources: who imports whom, one name in every room, sizes."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elmkernels import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "elmkernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = set(ops.__all__)

# The rooms from the ground up, and which of them a room may import besides itself. The longest
# prefix of a module's name decides.
MODEL = {"checks", "derivatives", "devices", "reference", "surgery", "text", "weights"}
KERNELS = {"backends", "ops", "processors"} | MODEL
ACCELERATED = {"openelm", "acceleration"} | KERNELS
COMPRESSING = {"compression"} | ACCELERATED
GENERATING = {"generation"} | COMPRESSING
MEASURING = {"testing", "bench"} | GENERATING
MAY_IMPORT: dict[str, set[str]] = {
    "interrupts": set(),
    "libraries": set(),
    "backends": {"libraries"},
    "devices": {"backends"},
    "checks": set(),
    "derivatives": set(),
    "processors": set(),
    "surgery": set(),
    "weights": {"checks"},
    "reference": {"weights.formats"},
    "text": {"checks", "weights"},
    "triton": set(),
    "ops": {"backends", "checks", "derivatives", "processors", "reference", "weights"},
    "openelm": MODEL,
    "openelm.compressed": MODEL | {"ops.linear"},  # the one place where a model meets an op
    "openelm.gguf": MODEL | {"ops.linear"},
    "acceleration": ACCELERATED,
    "generation": COMPRESSING,
    "compression": ACCELERATED,
    "evaluation": GENERATING,
    "integrations": GENERATING,
    "hf": {"integrations.huggingface"},
    "testing": GENERATING,
    "testing.cases": {"ops", "reference", "weights", "openelm.config"},
    "bench": MEASURING,
    "training": {"bench.benchmark", "bench.ceilings", "bench.chart", "bench.timing"} | ACCELERATED,
    "gpu_check": MEASURING,
    "cli": {"evaluation", "integrations", "training", "gpu_check", "__version__", "interrupts"}
    | MEASURING,
}
ANYTHING = {"__init__", "__main__"}
# What may be imported when a module is: the core dependencies, and Triton by its kernels.
CORE = {"torch", "numpy", "safetensors"}

TOP_LEVEL = {
    ".ci", ".clang-format", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md",
    "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "benchmarks", "csrc",
    "docs", "elmkernels", "examples", "pyproject.toml", "setup.py", "tests",
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
            # `from ..bench import chart` names a module, `from ..bench.chart import lines` as well.
            found |= {
                f"{base}.{a.name}" if not node.module or is_module(base, a.name) else base
                for a in node.names
            }
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
    room = max(rooms, key=len)
    allowed = MAY_IMPORT[room] | {room.partition(".")[0]}
    for imported in ours(path):
        assert any(in_room(imported, r) for r in allowed), f"{name} imports {imported}"


def arrows() -> dict[str, set[str]]:
    """{module: the modules that its file imports, early or late}."""
    names = {module_name(path) for path in SOURCES}
    return {module_name(p): {n for n in ours(p) if n in names} - {module_name(p)} for p in SOURCES}


def test_no_circle_of_files():
    """Late imports count: a circle that only works because it is late is a circle."""
    graph, done, path = arrows(), set(), []

    def walk(name: str) -> None:
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                walk(other)
            path.pop()
            done.add(name)

    for name in sorted(graph):
        walk(name)


ROOM_NAMES = {
    "acceleration", "bench", "cli", "compression", "evaluation", "generation", "gpu_check",
    "integrations", "openelm", "ops", "reference", "testing", "text", "training", "triton",
    "weights",
}  # fmt: skip


def test_the_package_holds_the_rooms_and_no_other():
    folders = {p.parent.relative_to(PACKAGE).parts[0] for p in SOURCES if p.parent != PACKAGE}
    assert folders == ROOM_NAMES
    files = {p.name for p in SOURCES if p.parent == PACKAGE}
    assert files == {
        "__init__.py", "__main__.py", "backends.py", "checks.py", "derivatives.py", "devices.py",
        "hf.py", "interrupts.py", "libraries.py", "processors.py", "surgery.py",
    }  # fmt: skip


@pytest.mark.parametrize("top", ["elmkernels", "csrc", "tests", "benchmarks"])
def test_no_folder_holds_more_than_16_files(top):
    folders: dict[str, int] = {}
    for path in (ROOT / top).rglob("*"):
        if path.is_file() and path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
            folders[relative(path.parent)] = folders.get(relative(path.parent), 0) + 1
    assert {name: n for name, n in folders.items() if n > 16} == {}


def test_the_model_stays_small():
    lines = sum(len(p.read_text().splitlines()) for p in (PACKAGE / "openelm").glob("*.py"))
    assert lines < 3000  # of which the public docstrings are some 300


# Of integrations.vllm, what is imported where vLLM is; the rest is tested without it.
OF_VLLM = {"configuration", "model", "ops", "products", "registration"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_extras_are_imported_late(path):
    top = {name.partition(".")[0] for name in imports(path, late=False)}
    allowed = CORE | set(sys.stdlib_module_names) | {"elmkernels"}
    if in_room(module_name(path), "triton"):
        allowed |= {"triton"}
    if in_room(module_name(path), "integrations.huggingface"):  # nothing else imports it
        allowed |= {"transformers"}
    if in_room(module_name(path), "integrations.vllm") and path.stem in OF_VLLM:
        allowed |= {"transformers", "vllm"}
    if module_name(path) == "evaluation.lm":  # a class of lm-eval's; imported late itself
        allowed |= {"lm_eval"}
    assert top <= allowed, f"imported by loading the module: {sorted(top - allowed)}"


LIMITS = {
    "ops/qk_norm_rope.py": 195, "ops/attention.py": 190, "ops/linear.py": 160,
    "ops/linear_cross_entropy.py": 175, "ops/decode_step.py": 185, "ops/_chunked_loss.py": 165,
    "reference/qk_norm_rope.py": 65,
}  # fmt: skip


def limit(path: Path) -> int:
    room = "tests" if ROOT / "tests" in path.parents else path.parent.name
    return LIMITS.get(f"{room}/{path.name}", {"ops": 150, "reference": 60}.get(room, 400))


CODE = [
    *SOURCES,
    *(p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.py")),
    *sorted((ROOT / "examples").rglob("*.py")),
]


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_files_stay_short_and_narrow(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= limit(path)
    assert max(map(len, lines), default=0) <= 100


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_functions_stay_short(path):
    """Of more than 8 positional parameters some are a record, or named; an op has its own."""
    kernels = module_name(path).startswith(("ops.", "triton.", "testing.cases."))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
            assert kernels or len(names) <= 8, f"{node.name}: {names}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_modules_are_described_and_validate_by_raising(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert vanishes under -O"
        if isinstance(node, ast.ExceptHandler):
            broad = not node.type or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (broad and all(isinstance(s, ast.Pass) for s in node.body)), node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_reason_why_not_is_called_missing(path):
    """Conditions then read forwards: `if reason := missing(...)`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            if ast.unparse(node.returns) in ("Reason | None", "dict[str, Reason | None]"):
                assert re.fullmatch(r"_?missing(_\w+)?|modes_of", node.name), node.name


def test_integers_are_asked_for_in_one_place():
    """By `checks.is_integer` and `checks.integer`, which take numpy's too and no booleans."""
    asking = {relative(p) for p in SOURCES if re.search(r"isinstance\(\w+, int\b", p.read_text())}
    # The others look at values of their own, not at arguments.
    assert asking <= {
        "elmkernels/checks.py", "elmkernels/openelm/cache.py", "elmkernels/training/journal.py",
    }  # fmt: skip


def test_one_function_says_whether_a_shortcut_may_be_taken():
    """`surgery.plain`: nobody else looks at hooks, and acceleration replaces no module."""
    for path in SOURCES:
        text, name = path.read_text(), module_name(path)
        assert name == "surgery" or not re.search(r"_(forward|backward)(_pre)?_hooks", text)
        if in_room(name, "acceleration"):
            assert not re.search(r"\b(set_module|add_module|setattr\(model)", text), name


def test_environment_variables_are_read_in_three_places_only():
    """Triton's own switch in backends; where the Hub's cache is, in hub; the toolchain's in
    setup.py. None is ours.
    """
    reading = {relative(p) for p in SOURCES if re.search(r"\benviron\b|\bgetenv\b", p.read_text())}
    assert reading <= {"elmkernels/backends.py", "elmkernels/text/hub.py"}
    for name, read in {
        "backends.py": {"TRITON_INTERPRET"},
        "text/hub.py": {"HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"},
    }.items():
        assert set(re.findall(r'environ\.get\("(\w+)"', (PACKAGE / name).read_text())) == read
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
EXTRAS += ["tokenizers", "sentencepiece", "datasets", "tensorboard", "lm_eval", "vllm", "onnx"]


def test_import_loads_no_extra():
    watched = ["triton", "matplotlib", "transformers", "safetensors", "vllm", "onnx"]
    loaded = run_alone(ROOT, [], watched, True)[1]
    assert loaded == ""


def test_import_works_with_torch_alone_and_nothing_built(tmp_path):
    shutil.copytree(
        PACKAGE,
        tmp_path / "elmkernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "build_report.json"),
    )
    usable, _ = run_alone(tmp_path, [*EXTRAS, "safetensors"], [], False)
    assert usable == "reference sdpa"
