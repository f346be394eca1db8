"""Which derivatives a function with kernels has: the first, and what torch.func makes of it. Of any
other (forward mode, a second one) it says so: a derivative that isn't there is an error, never 0.

torch.func's transforms ask an autograd.Function for `setup_context` and a rule for vmap; with them
torch binds the arguments by their names at every call, which costs more than a small kernel. So
each `Derivative` is two Functions made of the same parts: `apply` for a plain call, `transformed`
for one inside a transform or a level of forward mode.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

_transformed = torch._C._are_functorch_transforms_active


def unusual() -> bool:
    """Whether a call stands inside torch.func's transforms or a level of forward mode: an op then
    goes through its Function, whether a gradient is asked for or not.
    """
    return forward_ad._current_level >= 0 or _transformed()


def refuse(op: str, derivative: str, remedy: str | None = None) -> NoReturn:
    """Raise NotImplementedError: what has no such derivative, and what has."""
    remedy = remedy or 'call it with backend="reference"'
    raise NotImplementedError(f"{op} has no {derivative}: {remedy}")


def refuse_tangents(op: str, *tensors: Tensor | None, remedy: str | None = None) -> None:
    """Raise NotImplementedError if a tensor carries a tangent of forward mode."""
    if forward_ad._current_level >= 0 and any(x is not None and _is_dual(x) for x in tensors):
        refuse(op, "forward-mode derivative", remedy)


def _is_dual(x: Tensor) -> bool:
    """Whether a tensor, or what transforms have wrapped in it, carries a tangent."""
    while True:
        batched = is_batchedtensor(x)
        if not batched and forward_ad.unpack_dual(x).tangent is not None:
            return True
        if not is_functorch_wrapped_tensor(x):
            return False
        x = get_unwrapped(x)


class Derivative:
    """A function with a first derivative; a subclass gives its parts and the name of its op.

    A subclass has static methods `forward(*inputs)`, `keep(ctx, inputs, output)`, which saves what
    `backward(ctx, *cotangents)` needs. A backward computes through `once`.
    """

    op: ClassVar[str]
    remedy: ClassVar[str | None] = None
    forward: ClassVar[Callable[..., Any]]
    keep: ClassVar[Callable[..., None]]
    backward: ClassVar[Callable[..., Any]]
    apply: ClassVar[Callable[..., Any]]
    transformed: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        forward, keep, name = cls.forward, cls.keep, cls.__name__

        def with_context(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            keep(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(with_context), "backward": staticmethod(cls.backward)}
        cls.apply = type(name, (Function,), parts).apply
        cls.transformed = _general(name, forward, keep, cls.backward, cls.op, cls.remedy).apply


def _general(
    name: str, forward: Callable, keep: Callable, backward: Callable, op: str, remedy: str | None
) -> type[Function]:
    """The Function for transforms; forward mode refuses."""

    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse(op, "forward-mode derivative", remedy)

    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return _one_by_one(made.apply, info.batch_size, in_dims, inputs)

    parts = {"forward": forward, "setup_context": keep, "backward": backward}
    parts |= {"jvp": jvp, "vmap": vmap}
    made = type(name, (Function,), {key: staticmethod(part) for key, part in parts.items()})
    return made


def _one_by_one(fn: Callable, count: int, in_dims: tuple, inputs: tuple) -> tuple:
    """vmap by one call an example: kernels take a batch of rows, not of weights."""
    found = []
    for i in range(max(1, count)):
        example = [
            x if dim is None else x.select(dim, i) if count else x.new_zeros(x.select(dim, 0).shape)
            for x, dim in zip(inputs, in_dims, strict=True)
        ]
        found.append(fn(*example))
    if not isinstance(found[0], tuple):
        return torch.stack(found)[:count], 0
    stacked = tuple(
        None if x[0] is None else torch.stack(x)[:count] for x in zip(*found, strict=True)
    )
    return stacked, tuple(None if x is None else 0 for x in stacked)


class _Once(Function):
    """A backward's kernel where its result could be differentiated again, which then raises."""

    @staticmethod
    def forward(op: str, remedy: str | None, fn: Callable, *inputs: Any) -> Any:
        return fn(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op, ctx.remedy = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> NoReturn:
        refuse(ctx.op, "second derivative", ctx.remedy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse(ctx.op, "second derivative", ctx.remedy)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return _one_by_one(_Once.apply, info.batch_size, in_dims, inputs)


def once(op: str, fn: Callable, *inputs: Any, remedy: str | None = None) -> Any:
    """fn(*inputs) of a backward, whose own derivatives aren't there."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Once.apply(op, remedy, fn, *inputs)
    return fn(*inputs)
