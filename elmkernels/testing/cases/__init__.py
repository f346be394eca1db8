"""The record of every op, and its cases: the layer shapes of the four models, and the awkward ones.

A case is a recipe. `make` draws its tensors: non-zero random data, rounded to a dtype, with
gradients required wherever a model would require them. `CASES[op]` is small enough for tests;
`bench_cases(op)` are the model's own layers at the row counts of decoding up to training.
"""

from importlib import import_module

from ... import ops
from .draw import Case
from .spec import OpSpec

# The one list of ops is that of the public ones: each has a file here that is named as it is.
OPS: dict[str, OpSpec] = {op: import_module(f"{__name__}.{op}").SPEC for op in ops.__all__}
CASES: dict[str, list[Case]] = {op: spec.cases for op, spec in OPS.items()}

BENCH_ROWS = (1, 8, 64, 512, 4096)


def bench_cases(
    op: str, rows: tuple[int, ...] = BENCH_ROWS, model: str = "1_1B", layer: int = -1
) -> list[Case]:
    """The op in one layer of one model.

    Args:
        op: its name.
        rows: how many tokens at once; a case for each.
        model: "270M", "450M", "1_1B" or "3B".
        layer: its number; -1 is the last.

    Returns:
        The cases.

    Example:
        >>> [case.name for case in bench_cases("swiglu", (1, 8), "270M")]
        ['270M_rows_1', '270M_rows_8']
    """
    return OPS[op].bench_cases(model, rows, layer)
