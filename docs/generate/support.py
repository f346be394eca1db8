"""docs/support.md: which op runs where, in which dtypes, forward and backward, from the backends.

Nothing here depends on the machine: what a backend lacks on this one, `elmkernels info` says.
"""

import textwrap
from functools import cache

import torch
from torch import Tensor

from elmkernels.backends import (
    AMX,
    AMX_GROUNDS,
    BASES,
    COMPOSED,
    FEW,
    FEW_ROWS,
    PREFERENCE,
    REFERENCE,
    declared,
    defined,
    implements,
)
from elmkernels.checks import DTYPES
from elmkernels.ops._attention_choice import ON_GPU, TRITON_HEAD_DIM
from elmkernels.ops.linear import MAX_ROWS
from elmkernels.testing.cases import CASES
from elmkernels.testing.cases.draw import make
from elmkernels.weights.formats import BITS, GROUP_SIZES

from .doors import tables
from .figures import table

HEAD = """# What runs where

Generated from the backends by `python -m docs.generate`; `elmkernels info` says which of these this
very machine can run, and why it can't run the others. A backend that is listed for an op supports
all that the op's checks accept: any shape and strides, and every dtype of the table.
"""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(backend: str) -> str:
    if backend == REFERENCE:
        return " and ".join(PREFERENCE)
    return " and ".join(device for device, names in PREFERENCE.items() if backend in names)


def _backends() -> list[str]:
    """Every backend once, in the order of preference."""
    return list(dict.fromkeys([*(n for names in PREFERENCE.values() for n in names), REFERENCE]))


@cache
def _differentiable(op: str) -> bool:
    """Whether some case of an op has an input that takes a gradient."""
    drawn = (make(case, case.dtypes[0]) for case in CASES[op][:32])
    return any(
        isinstance(x, Tensor) and x.requires_grad
        for args, kwargs in drawn
        for x in (*args, *kwargs.values())
    )


def backward(op: str, backend: str) -> str:
    """How an op's gradients are computed by a backend."""
    if not _differentiable(op):
        return "none"
    if backend in COMPOSED:
        return "torch's autograd"
    return "own kernel" if "bwd" in declared(op) else "torch's products"


def rows() -> list[list[str]]:
    """Op, backend, devices, one cell for each dtype, backward."""
    return [
        [f"`{op}`", f"`{name}`", _device(name), *["yes"] * len(DTYPES), backward(op, name)]
        for op in defined()
        for name in _backends()
        if name == REFERENCE or implements(name, op)
    ]


def _choices() -> str:
    return "\n".join(
        _wrapped(f"- `{kind}`: {_then(choice.order)} ({choice.grounds})", "  ")
        for kind, choice in ON_GPU.items()
    )


def _then(names: tuple[str, ...]) -> str:
    return ", then ".join(f"`{name}`" for name in names)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_on_hyphens=False)


def page() -> str:
    cpu, cuda = (", ".join(f"`{n}`" for n in names) for names in PREFERENCE.values())
    few = FEW["cuda"]
    taken = (
        "An op whose caller names no backend takes the first that can run here. On a CPU that is "
        f"the first of {cpu}. On a GPU it is the first of {cuda}, with two exceptions. The norms "
        f"and `qk_norm_rope` on at most {FEW_ROWS} rows without gradients take {_then(few.order)} "
        f"({few.grounds}). `attention` decides by the call:"
    )
    bits, groups = (" or ".join(map(str, x)) for x in (BITS, GROUP_SIZES))
    forms = (
        f"- `linear` takes a plain weight, `Affine` ({bits} bits, groups of {groups} columns) or "
        "`Packed12` (bfloat16 alone). A compressed weight takes no gradient; what it is multiplied "
        f"by does. Up to {MAX_ROWS} rows go through a streaming kernel, more through torch's "
        "product."
    )
    tiles = (
        f"- `{AMX}` has kernels of its own for bfloat16: `attention`, and `linear` of an affine "
        f"weight with more than {MAX_ROWS} rows. Its others, in other dtypes and of other ops, are "
        f"those of `{BASES[AMX]}`, which a call takes before it if none is named ({AMX_GROUNDS})."
    )
    head = ["op", "backend", "device", *map(_name, DTYPES), "backward"]
    return f"""{HEAD}
{table(head, rows())}

`torch's products` means that the matrix products of the backward pass are torch's own; what lies
between them (a weight made dense block by block, the gradient of a row of logits) is ours.

## Limits

{_wrapped(forms, "  ")}
{_wrapped(tiles, "  ")}
- `decode_step` takes up to {MAX_ROWS} tokens, of one sequence or of several, the same forms of
  weights, and has no backward.
- `attention` by `triton` takes heads of up to {TRITON_HEAD_DIM}.
- No op has a derivative of a derivative, or forward-mode derivatives.
- GPUs need compute capability 8.0 or newer. What has run on a GPU and what has not:
  [gpu.md](gpu.md).

## Which backend an op takes

{_wrapped(taken)}

{_choices()}

## Doors

What this package reads and what it writes, and the test that holds each to it. Tests of other
projects' programs are marked `ecosystem` or `vllm` ([CONTRIBUTING.md](../CONTRIBUTING.md)).

{tables()}
"""
