"""Reaching into a model: modules at a path, whether a module does what its class says, and the mark
that `accelerate` leaves on a model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..checks import DTYPES

M = TypeVar("M", bound=nn.Module)
_MARK = "_elmkernels_accelerated"
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass
class Mark:
    """What `accelerate` keeps in a model: the modules that were there, its own arguments, and the
    backend that each op is given ({op: its name, None for the best at every call}).
    """

    originals: dict[str, nn.Module]
    arguments: dict[str, Any]
    backends: dict[str, str | None]


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of the model."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    owner._modules[name] = module


def mark_of(model: nn.Module) -> Mark | None:
    """The mark of this very model; None if it isn't accelerated."""
    return getattr(model, _MARK, None)


def set_mark(model: nn.Module, mark: Mark | None) -> None:
    """Mark a model as accelerated, or with None take its mark away."""
    if mark is None:
        vars(model).pop(_MARK, None)
    else:
        setattr(model, _MARK, mark)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has put modules into this very model."""
    return mark_of(model) is not None


def given_backend(model: nn.Module, op: str) -> str | None:
    """The backend that `accelerate` gives to an op of this model; None for the best at every call,
    which is also what a model takes that isn't accelerated.
    """
    mark = mark_of(model)
    return None if mark is None else mark.backends[op]


def undo_of(model: nn.Module) -> Callable[[], None]:
    """What puts every module that is in the model now, and its mark, back in place."""
    children = [(module._modules, dict(module._modules)) for module in model.modules()]
    mark = mark_of(model)

    def undo() -> None:
        for held, before in children:
            held.clear()
            held.update(before)
        set_mark(model, mark)

    return undo


def twin(model: M) -> M:
    """A copy of the modules that shares the Parameters: to be accelerated beside the original."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def has_hooks(module: nn.Module) -> bool:
    """Whether anything hangs on the module's forward or backward."""
    return any(getattr(module, name, None) for name in (*_FORWARD_HOOKS, *_BACKWARD_HOOKS))


def missing_dtype(body: nn.Module) -> str | None:
    """Why the ops can't compute in the dtypes of a model's weights, or None. body: what holds its
    layers, norm and embedding.
    """
    for name, weight in body.named_parameters():
        known = name.startswith(("layers.", "norm.", "token_embeddings."))
        if known and weight.is_floating_point() and weight.dtype not in DTYPES:
            dtypes = ", ".join(str(dtype) for dtype in DTYPES)
            return f"`{name}` is {weight.dtype}, the kernels take {dtypes}"
    return None


def forward_hooks(module: nn.Module) -> list[dict]:
    """The module's own dicts of forward hooks, empty as long as there are none."""
    return [getattr(module, name) for name in _FORWARD_HOOKS]


def unhooked(*modules: nn.Module) -> bool:
    """Whether calling the modules is what their classes say and nothing more."""
    return not any("forward" in vars(m) or any(forward_hooks(m)) for m in modules)
