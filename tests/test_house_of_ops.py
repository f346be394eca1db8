"""The house rules of ops: one name in every room, one record, few places that know it."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

from elmkernels import ops
from elmkernels.backends import CPU, defined, implements
from elmkernels.testing import OPS as RECORDS

OPS = set(ops.__all__)
SOURCES = sorted((ROOT / "elmkernels").rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Where each op lives: the specification everywhere, kernels where the dispatch expects them.
ROOMS = {
    "elmkernels/reference/*.py": OPS,
    "elmkernels/ops/*.py": OPS,
    "elmkernels/testing/cases/*.py": OPS,
    "csrc/cpu/*.cpp": {op for op in defined() if implements(CPU[0], op)},
    "csrc/cuda/*.cu": {op for op in defined() if implements("cuda", op)},
    "elmkernels/triton/*.py": {op for op in defined() if implements("triton", op)},
}


@pytest.mark.parametrize("pattern", ROOMS)
def test_one_op_has_the_same_name_in_every_room(pattern):
    names = {path.stem for path in ROOT.glob(pattern)}
    names = {name for name in names if not name.startswith("_")}  # parts of one op
    assert names - {"common", "draw", "spec", "weights"} == ROOMS[pattern]


def test_every_op_has_a_record_of_its_own_name_and_the_dispatch_knows_no_other():
    assert {op: (spec.name, {c.op for c in spec.cases}) for op, spec in RECORDS.items()} == {
        op: (op, {op}) for op in OPS
    }
    assert set(defined()) <= OPS


# All that a new op touches in the project, if it has every kind of kernel; CONTRIBUTING says what
# goes where. A file whose name begins with _ is a part of the op that it names.
PLACES = (
    "elmkernels/reference/{op}.py",
    "elmkernels/reference/__init__.py",
    "elmkernels/ops/{op}.py",
    "elmkernels/ops/__init__.py",
    "elmkernels/testing/cases/{op}.py",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "elmkernels/triton/{op}.py",
    "tests/ops/test_errors.py",
)
# The rooms that use ops: what a model or a check of a machine takes of one, it asks for by name.
USERS = {"acceleration", "generation", "gpu_check"}


def names_of_ops(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in OPS}


def known_in() -> dict[str, set[str]]:
    """{op: files of the package, kernels and benchmarks that are named as it or hold its name}."""
    found: dict[str, set[str]] = {op: set() for op in OPS}
    for folder in ("elmkernels", "csrc", "benchmarks/ops"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.stem in OPS and path.suffix != ".pyc":
                found[path.stem].add(relative(path))
            if path.suffix == ".py" and path.relative_to(ROOT).parts[1] not in USERS:
                for op in names_of_ops(ast.parse(path.read_text())):
                    found[op].add(relative(path))
    return found


# Words that are no op: a field of OpenELM's config, an option of `linear`, a fact of llama.cpp's,
# what transformers calls an interface, options of Liger's,
# whose derivative an error speaks of.
OTHER_WORDS = {
    "elmkernels/integrations/huggingface/attention.py": {"attention"},
    "elmkernels/integrations/huggingface/liger.py": {"rms_norm", "swiglu"},
    "elmkernels/integrations/vllm/switch.py": {
        *("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu", "linear"),
    },
    "elmkernels/openelm/config.py": {"rms_norm"},
    "elmkernels/openelm/shared_weight.py": {"linear_cross_entropy"},
    "elmkernels/ops/linear.py": {"swiglu"},
    "elmkernels/testing/cases/_linear_fused.py": {"swiglu"},
    "elmkernels/bench/ceilings.py": {"linear"},
    "elmkernels/testing/ptx/meter.py": {"attention", "linear", "linear_cross_entropy"},
    "elmkernels/bench/runners.py": {"attention"},
}


def test_a_new_op_touches_at_most_nine_places():
    assert len(PLACES) <= 9
    for op, files in known_in().items():
        files = {name for name in files if op not in OTHER_WORDS.get(name, ())}
        parts = {name for name in files if f"/_{op.split('_')[0]}" in name}
        assert files - parts <= {place.format(op=op) for place in PLACES}, op
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for place in PLACES:
        assert f"`{place.format(op='<op>')}`" in text, place


def test_nothing_is_decided_by_the_name_of_an_op():
    """What differs from op to op is in its record; `op == "..."` would be a second one."""
    plain = (ast.Constant, ast.Tuple, ast.List, ast.Set)
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            sides = [node.value] if isinstance(node, ast.MatchValue) else []
            sides += [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            named = set().union(*(names_of_ops(s) for s in sides if isinstance(s, plain)))
            if named - OTHER_WORDS.get(relative(path), set()):
                found.append(f"{relative(path)}:{node.lineno} {ast.unparse(node)}")
    assert found == []
