"""Reaching into a model: modules at a path, whether a module is plain, and the mark that
`accelerate` leaves on a model.

A shortcut is a forward that doesn't call a child, or makes an intermediate again. `plain(child)`
alone decides whether it may, and is asked at every call: hooks come and go.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)
K = TypeVar("K", bound=type)
_MARK = "_elmkernels_accelerated"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# torch's own dicts of hooks on every module there is.
GLOBAL_HOOKS: tuple[dict[Any, Any], ...] = tuple(getattr(_module, f"_global{h}") for h in HOOKS)
_TENSORS = (nn.Parameter, Tensor)
# {class: what of its methods must still be so, as (class that has it, name, function)}: of a fused
# class the methods of the one below it. A dict, as torch.compile follows `in` on one.
_KNOWN: dict[type, tuple[tuple[type, str, object], ...]] = {}


def known(kind: K, *calls: str) -> K:
    """Tell `plain` of a class whose forward computes what this package's ops compute. calls: the
    methods that its forward calls, and a shortcut doesn't.
    """
    base = vars(kind).get("_base") or next((c for c in kind.__mro__ if c in _KNOWN), kind)
    own = tuple((base, name, getattr(base, name)) for name in ("forward", *calls))
    _KNOWN[kind] = _KNOWN.get(base, own)
    return kind


def knows(*calls: str) -> Callable[[K], K]:
    """`known` as a decorator of a class whose forward calls such methods."""
    return lambda kind: known(kind, *calls)


for _class in (nn.Linear, nn.Embedding, nn.SiLU):
    known(_class)


@cache
def methods_of(cls: type) -> tuple[tuple[type, str, object], ...]:
    """What of a class's methods must be as it was for its fused forward to compute what they do:
    that of the first known class that it is of.
    """
    return next((_KNOWN[c] for c in cls.__mro__ if c in _KNOWN), ())


def as_made(cls: type) -> bool:
    """Whether the methods of a class are still what they were: some code replaces a class's forward
    for all of its modules.
    """
    if torch.compiler.is_compiling():
        return True
    for owner, name, function in methods_of(cls):
        if getattr(owner, name) is not function:
            return False
    return True


def own_methods(module: nn.Module) -> list[str]:
    """Methods that a forward calls, of which a module has its own."""
    own = vars(module)
    return [name for _, name, _ in methods_of(type(module)) if name in own]


def untouched(module: nn.Module) -> bool:
    """Whether calling a module is its class's forward and nothing more: no hook of any kind, no
    forward of its own.
    """
    own = module.__dict__
    return not (
        "forward" in own
        or "_compiled_call_impl" in own
        or "_slow_forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or GLOBAL_HOOKS[0]
        or GLOBAL_HOOKS[1]
        or GLOBAL_HOOKS[2]
        or GLOBAL_HOOKS[3]
    )


def plain_tensor(x: object) -> bool:
    """Whether x is a tensor of torch's own class: no DTensor, no quantized tensor."""
    return type(x) in _TENSORS


def has_tensor_hooks(weight: Tensor) -> bool:
    """Whether something waits for the gradient of a Parameter."""
    after = getattr(weight, "_post_accumulate_grad_hooks", None)
    return bool(weight._backward_hooks or after)


def plain(module: nn.Module | None) -> bool:
    """Whether a shortcut may go past a module: its class is exactly one that is known, or the fused
    subclass of one (so it is no wrapper, no adapter and not parametrized), whose methods nobody has
    replaced, there or in the module; nothing hangs on it, and its weights are tensors of torch's
    own class.
    """
    kind = type(module)
    if kind not in _KNOWN or module is None or not untouched(module):
        return False
    if not torch.compiler.is_compiling():
        own = module.__dict__
        for owner, name, function in _KNOWN[kind]:
            if name in own or getattr(owner, name) is not function:
                return False
    # Of a dict that makes weights dense for whoever reads it (`weights.prepacked`), none is read.
    for weight in dict.values(module.__dict__["_parameters"]):
        if weight is not None and type(weight) not in _TENSORS:
            return False
    return True


def missing_own(module: nn.Module) -> str | None:
    """Why a module does another thing than its class says, whatever class it has; None if it
    doesn't.
    """
    if "parametrizations" in module._modules:
        return "it is parametrized"
    if "forward" in vars(module) or "_slow_forward" in vars(module):
        return "it has a forward of its own"
    for name, weight in dict.items(module.__dict__["_parameters"]):
        if weight is not None and type(weight) not in _TENSORS:
            return f"its {name} is a {type(weight).__name__}, not a plain tensor"
    return None


def missing_plain(module: nn.Module) -> str | None:
    """Why a module isn't plain, beside its class; None if nothing else is in the way."""
    if any(vars(module).get(name) for name in HOOKS):
        return "it has hooks"
    if "_compiled_call_impl" in vars(module):
        return "it is compiled by itself"
    if any(GLOBAL_HOOKS):
        return "there are hooks on all modules"
    if not as_made(type(module)):
        return "its class was given another forward"
    if own := [name for name in own_methods(module) if name != "forward"]:
        return f"it has a method {own[0]} of its own"
    return missing_own(module)


@dataclass
class Mark:
    """What `accelerate` keeps in a model: its own arguments, and the backend that each op is given
    ({op: its name, None for the best at every call}).
    """

    arguments: dict[str, Any]
    backends: dict[str, str | None]


def gathered(method: F) -> F:
    """A method that uses weights beside `forward`: FSDP2 brings a module's weights together for
    what it was told of, and is told of this at the first call.
    """
    name = method.__name__

    @wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if name in self.__dict__ or not hasattr(type(self), "unshard"):
            return method(self, *args, **kwargs)
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(self, name)
        return getattr(self, name)(*args, **kwargs)

    return cast(F, call)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of the model."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    owner._modules[name] = module


def mark_of(model: nn.Module) -> Mark | None:
    """The mark of this very model; None if it isn't accelerated."""
    return getattr(model, _MARK, None)


def has_mark(model: nn.Module) -> bool:
    """Whether it is this very module that is marked, and not one that it wraps."""
    return _MARK in vars(model)


def set_mark(model: nn.Module, mark: Mark | None) -> None:
    """Mark a model as accelerated, or with None take its mark away."""
    if mark is None:
        vars(model).pop(_MARK, None)
    else:
        setattr(model, _MARK, mark)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has given modules of this very model their fused classes."""
    return mark_of(model) is not None


def given_backend(model: nn.Module, op: str) -> str | None:
    """The backend that `accelerate` gives to an op of this model; None for the best at every call,
    which is also what a model takes that isn't accelerated.
    """
    mark = mark_of(model)
    return None if mark is None else mark.backends[op]


def rounding_of(attributes: dict[str, Any]) -> str | None:
    """What `accelerate` was told of activations, by the attributes of the model that it marked."""
    mark = attributes.get(_MARK)
    return None if mark is None else mark.arguments.get("activations")


def twin(model: M) -> M:
    """A copy of the modules that shares the Parameters: to be accelerated beside the original."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
