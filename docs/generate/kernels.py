"""The sentence of docs/gpu.md about the Triton kernels that tests execute: how many there are, and
by how many cases. Counted from the sources and the cases, so that it needs no Triton.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from elmkernels.testing.cases import CASES

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


def executed() -> str:
    cases = Counter(
        str(dtype).removeprefix("torch.") for op in ops() for c in CASES[op] for dtype in c.dtypes
    )
    counts = ", ".join(f"{cases[name]:,} in {name}" for name in sorted(cases))
    return (
        f"- That is every one of {len(launched())} kernels in each of {cases.total():,} cases of "
        f"{len(ops())} ops: {counts}."
    )
