"""Fused subclasses: a module's own class with a fused forward before it, put on in place.

The module stays the same object: its hooks, Parameters, children, names and `isinstance` answers
are what they were, and policies by class go on finding it. What a fused forward needs beside the
module's own attributes is in one attribute, which no state_dict holds.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import nn

from ..surgery import as_made, known
from ..weights.prepacked import plain_parameters

F = TypeVar("F", bound=Callable[..., Any])
STATE = "_fused"


class Fused(nn.Module):
    """What all fused classes share. `super().forward` of one is the forward of the module's own
    class: what is called if the kernels don't take what comes.
    """

    _fused: Any
    keeps_name = False  # whether its classes are called as those below them

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Made at run time, a class is found by no name: a copy is made of the class below it, then
        # given the fused one again.
        made, cls = super().__reduce_ex__(protocol), type(self)
        if "_base" not in vars(cls) or not isinstance(made, tuple):
            return made
        make, args, *rest = made
        args = tuple(vars(cls)["_base"] if a is cls else a for a in args)
        return (_again, (vars(cls)["_kind"], make, args), *rest)


def _again(kind: type[Fused], make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = make(*args)
    module.__class__ = fused_class(kind, type(module))
    return module


def while_fused(method: F) -> F:
    """A fused method that outlives `unfuse`: whoever kept it bound (a patched forward that
    checkpoints, or that wraps it in a hook of its own) then gets that of the module's own class. So
    does everybody if that class was given another one.
    """
    name = method.__name__

    @wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if STATE in self.__dict__ and as_made(type(self)):
            return method(self, *args, **kwargs)
        return getattr(own_class(type(self)), name)(self, *args, **kwargs)

    return cast(F, call)


def setting(name: str) -> Any:
    """A property that reads and writes one of the settings in a fused module's state."""

    def put(module: Any, value: object) -> None:
        setattr(module._fused, name, value)

    return property(lambda module: getattr(module._fused, name), put)


_MADE: dict[tuple[type, type], type] = {}
_WITHOUT: dict[type, type] = {}


def fused_class(kind: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that computes as `kind` does; made once."""
    if base in kind.__bases__:
        return kind
    if (kind, base) not in _MADE:
        own = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_base": base, "_kind": kind}
        name = f"Fused{base.__name__}"
        if kind.keeps_name:
            name = base.__name__
            own |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _MADE[kind, base] = known(type(name, (kind, base), own))
    return _MADE[kind, base]


def own_class(cls: type) -> type:
    """A class without what `fuse` put into it. What was put on top of a fused class meanwhile (by
    FSDP2, by a parametrization) stays on top.
    """
    if not issubclass(cls, Fused):
        return cls
    if "_base" in vars(cls):
        return vars(cls)["_base"]
    if Fused in cls.__bases__:
        return next(base for base in cls.__bases__ if base is not Fused)
    if cls not in _WITHOUT:
        kept = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        bases = tuple(own_class(base) for base in cls.__bases__)
        make: Any = type(cls)
        _WITHOUT[cls] = make(cls.__name__, bases, kept)
    return _WITHOUT[cls]


def fuse(module: nn.Module, kind: type[Fused], state: object) -> None:
    """Give a module the fused subclass of its class, and what that needs."""
    vars(module)[STATE] = state
    module.__class__ = fused_class(kind, type(module))


def unfuse(module: nn.Module) -> None:
    """Give a module its own class back, if it is a fused one."""
    if isinstance(module, Fused):
        module.__class__ = own_class(type(module))
        vars(module).pop(STATE, None)
        plain_parameters(module)


def undo_of(model: nn.Module) -> Callable[[], None]:
    """What puts the class and the state that every module has now back in place."""
    before = [(m, m.__class__, vars(m).get(STATE)) for m in model.modules()]

    def undo() -> None:
        for module, cls, state in before:
            plain_parameters(module)
            if module.__class__ is not cls:
                module.__class__ = cls
            if state is None:
                vars(module).pop(STATE, None)
            else:
                vars(module)[STATE] = state

    return undo
