"""The sentence of docs/gpu.md about the Triton kernels that tests execute: how many there are, and
by how many cases. Counted from the sources and the cases, so that it needs no Triton.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from elmkernels.testing.cases import CASES
from elmkernels.testing.cases.draw import Case

# Left out in float32, whose products no matrix unit has: long ones, by kernels that others of these
# cases launch too.
LEFT = {
    "attention": (
        "long", "long_prompt", "ragged_long", "scores_of_hundreds", "varlen_long_among_short",
        "varlen_long_first", "varlen_off_every_block", "varlen_one_document", "varlen_short",
        "varlen_two_long",
    ),
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2] / "elmkernels" / "triton"


def ops() -> list[str]:
    """The ops that Triton has kernels for."""
    return [op for op in CASES if (ROOT / f"{op}.py").is_file()]


def _launches(tree: ast.AST) -> Iterator[str]:
    """Names that are called as `name[grid](...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            if isinstance(node.func.value, ast.Name):
                yield node.func.value.id


def launched() -> set[tuple[str, str]]:
    """(module, name) of each kernel that a launcher launches."""
    trees = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
    return {(module, name) for module, tree in trees.items() for name in _launches(tree)}


def calls() -> list[tuple[str, Case, torch.dtype]]:
    """Every op, case and dtype that tests execute."""
    return [
        (op, case, dtype)
        for op in ops()
        for case in CASES[op]
        for dtype in case.dtypes
        if dtype != torch.float32 or case.name not in LEFT.get(op, ())
    ]


def executed() -> str:
    cases = Counter(str(dtype).removeprefix("torch.") for _, _, dtype in calls())
    counts = ", ".join(f"{cases[name]:,} in {name}" for name in sorted(cases))
    return (
        f"{len(launched())} kernels, every one that a launcher launches, by {cases.total():,} "
        f"cases of {len(ops())} ops: {counts}. In float32 {sum(map(len, LEFT.values()))} long ones "
        "are left out."
    )
