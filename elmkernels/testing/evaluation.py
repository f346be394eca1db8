"""Evaluations of a case that parity compares: on fresh inputs, in any dtype, with its gradients."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..weights.formats import Arena
from .cases import OPS
from .cases.draw import Case


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN before a kernel gets it: what it forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Only the filling is wanted: an operation of torch without a deterministic form may run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def specification(op: str) -> Callable:
    """The reference of an op under the op's public signature, with what it writes in place."""
    spec = OPS[op]
    return spec.observe(spec.adapt(getattr(reference, op)))


def _widen(x: Any, dtype: torch.dtype | None) -> Any:
    """A fresh leaf with x's data, layout and need of a gradient; floats in `dtype` if given.
    Weights in forms of their own and decoders of them are read only, in the dtype that they have.
    """
    if isinstance(x, Arena):
        return x._replace(data=_widen(x.data, dtype))
    if not isinstance(x, Tensor):
        return x
    copy = x.detach()
    if x.is_floating_point():
        copy = copy.to(dtype) if dtype else copy
        # Caches are written: each run needs its own. Leaves are read: they keep their layout.
        copy = copy if x.requires_grad else copy.clone()
    return copy.requires_grad_(x.requires_grad)


def _cotangents(case: Case, outputs: Sequence[Tensor], seed: int) -> list[Tensor | None]:
    """The gradients that arrive at the outputs, random, laid out as the case says."""
    found: list[Tensor | None] = []
    for i, out in enumerate(outputs):
        generator = torch.Generator(out.device).manual_seed(seed + 1 + i)
        shape = list(out.shape)
        if case.cotangent == "broadcast":
            shape[:-1] = [1] * (len(shape) - 1)
        elif case.cotangent == "strided":
            shape[-1] *= 2
        dy = torch.randn(shape, generator=generator, device=out.device).to(out.dtype)
        if case.cotangent == "strided":
            dy = dy[..., ::2]
        found.append(None if i in case.unused else dy.expand(out.shape))
    return found


def as_tuple(x: Tensor | tuple) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def evaluate(
    fn: Callable, case: Case, inputs: tuple[tuple, dict], dtype: torch.dtype | None, seed: int,
    like: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """{"y": ..., "grad x": ...}: a function's outputs and gradients on (widened) inputs. The
    cotangents are drawn for the outputs `like`, so that every run gets the same ones."""
    args = tuple(_widen(a, dtype) for a in inputs[0])
    kwargs = {key: _widen(value, dtype) for key, value in inputs[1].items()}
    outputs = as_tuple(fn(*args, **kwargs))
    names = OPS[case.op].outputs
    found = {name: out.detach() for name, out in zip(names, outputs, strict=True)}
    parameters = list(inspect.signature(getattr(ops, case.op)).parameters)
    named = dict(zip(parameters, args, strict=False)) | kwargs
    leaves = {name: a for name, a in named.items() if _needs_grad(a)}
    pairs = [
        (out, dy.to(out.dtype))
        for out, dy in zip(outputs, _cotangents(case, like or outputs, seed), strict=True)
        if dy is not None and out.requires_grad
    ]
    if pairs and leaves:
        reached, arriving = zip(*pairs, strict=True)
        grads = torch.autograd.grad(reached, [*leaves.values()], arriving, allow_unused=True)
        for (name, leaf), g in zip(leaves.items(), grads, strict=True):
            # A leaf that no used output depends on: None and zeros say the same.
            found[f"grad {name}"] = torch.zeros_like(leaf) if g is None else g
    return found


def _needs_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def detached(inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
    def strip(x: Any) -> Any:
        if isinstance(x, Arena):
            return x._replace(data=x.data.clone())
        return x.detach().clone() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(strip(a) for a in inputs[0]), {k: strip(v) for k, v in inputs[1].items()}
