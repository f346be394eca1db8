"""Reaching into a model: modules at a path, whether a module does what its class says, and the mark
that `accelerate` leaves on a model.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

_MARK = "_elmkernels_accelerated"
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass
class Mark:
    """What `accelerate` keeps in a model: the modules that were there, and its own arguments."""

    originals: dict[str, nn.Module]
    arguments: dict[str, Any]


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


def asked_backend(model: nn.Module) -> str | None:
    """The backend that `accelerate` was asked for; modules may have been given another."""
    mark = mark_of(model)
    return None if mark is None else mark.arguments["backend"]


def has_hooks(module: nn.Module) -> bool:
    """Whether anything hangs on the module's forward or backward."""
    return any(getattr(module, name, None) for name in (*_FORWARD_HOOKS, *_BACKWARD_HOOKS))


def forward_hooks(module: nn.Module) -> list[dict]:
    """The module's own dicts of forward hooks, empty as long as there are none."""
    return [getattr(module, name) for name in _FORWARD_HOOKS]


def unhooked(*modules: nn.Module) -> bool:
    """Whether calling the modules is what their classes say and nothing more."""
    return not any("forward" in vars(m) or any(forward_hooks(m)) for m in modules)
