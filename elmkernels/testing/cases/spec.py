"""What is known of an op besides its formula: one `OpSpec`, in the file that is named as the op.

What measures, proves or lists ops reads these records and names none itself.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .draw import Case


def _as_it_is(fn: Callable) -> Callable:
    return fn


def no_other(args: tuple, kwargs: dict, device: torch.device) -> dict[str, Callable | None]:
    """The baselines of an op that torch has no operation for: its reference alone."""
    return {}


def total_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements of tensors, once each, whatever their strides."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def streamed_bytes(args: tuple, kwargs: dict, outputs: tuple[Tensor, ...], backward: bool) -> int:
    """Every floating argument read once and every output written once; with the backward, both
    read again with the cotangents in the outputs' place, and the gradients written."""
    floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    forward = total_bytes(*floats, *outputs)
    return 2 * forward + total_bytes(*floats) if backward else forward


@dataclass(frozen=True)
class OpSpec:
    """The record of one op.

    Args:
        name: the op's, in every room.
        outputs: the names of what it gives, in order, as verdicts print them.
        cases: inputs small enough for tests.
        bench_cases: `(model, rows, layer)` to the inputs of that layer of that model, as many
            tokens at once as each of `rows` says.
        slack: times the slack of the rule of parity; more only for an op whose formula amplifies
            rounding.
        reordered: the reference with what it sums in another order, drawn from the `Orders` that
            come first: see `equivalent`.
        adapt: makes of the reference, or of another evaluation of it, a function with the op's
            public signature.
        observe: makes of such a function one that also returns what it writes in place, so that
            parity sees it.
        backward: whether the op has kernels for a backward, which is then timed too.
        baselines: `(args, kwargs, device)` to `{name: function under the op's signature}` of what
            else computes it on these inputs, None if it isn't installed.
        compiled: whether `torch.compile` takes the reference whole.
        least_bytes: `(args, kwargs, outputs, backward)` to the bytes that must move.
        operations: `(args, kwargs, backward)` to the floating-point operations of the op's matrix
            products; None if it has none.

    Example:
        >>> OPS["rms_norm"].outputs
        ('y',)
    """

    name: str
    outputs: tuple[str, ...]
    cases: list[Case]
    bench_cases: Callable[[str, tuple[int, ...], int], list[Case]]
    reordered: Callable[..., Any]
    slack: float = 1.0
    adapt: Callable[[Callable], Callable] = _as_it_is
    observe: Callable[[Callable], Callable] = _as_it_is
    backward: bool = True
    baselines: Callable[[tuple, dict, torch.device], dict[str, Callable | None]] = no_other
    compiled: bool = True
    least_bytes: Callable[[tuple, dict, tuple[Tensor, ...], bool], int] = streamed_bytes
    operations: Callable[[tuple, dict, bool], int] | None = None


def checked(build: Callable[[int], Case], rows: tuple[int, ...]) -> list[Case]:
    """A case for each number of rows. Parity of 512 stands for more, which are too many to repeat
    in float64: kernels of 512 rows already split them among threads and chunks.
    """
    return [replace(build(n), check=build(512) if n > 512 else None) for n in rows]


def installed(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a package that may be absent, or of a version without it."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    return getattr(importlib.import_module(module), name, None)


def liger(name: str) -> Callable[..., Any] | None:
    """A function of Liger-Kernel, where it is installed and has it."""
    return installed("liger_kernel.transformers.functional", name)
