"""Whether a module computes what a kernel does: by its parts, then by trying it.

Tried is the forward of the module's own class, so that no hook is called.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.random import fork_rng

from .. import reference
from ..backends import Reason
from ..openelm import layers
from ..openelm.compressed import Compressed
from ..surgery import missing_own, missing_plain, plain_tensor
from .classes import Fused, own_class

_APART = ("__init__", "extra_repr")  # methods that compute nothing of a forward


def own_forward(module: nn.Module, *args: Any) -> Any:
    """The forward of a module's own class, without hooks and without gradients."""
    kind = getattr(module, "weight", None)
    device = kind.device.type if isinstance(kind, Tensor) else "cpu"
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return own_class(type(module)).forward(module, *args)


def _random(width: int, like: Tensor) -> Tensor:
    return torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(like)


def missing_alone(module: nn.Module) -> Reason | None:
    """Why a module may be more than its own class: it wraps others, or answers for them."""
    if any(True for _ in module.children()):
        return f"{type(module).__name__} wraps other modules"
    if type(module).__getattr__ is not nn.Module.__getattr__:
        return f"{type(module).__name__} answers for another module"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{type(module).__name__} is called in a way of its own"
    return None


def missing_norm(norm: nn.Module) -> Reason | None:
    """Why a module is no RMSNorm as the reference computes it."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return "it has no 1-dimensional weight"
    eps = getattr(norm, "eps", None)
    if not isinstance(eps, float):
        return "it has no eps"
    if getattr(norm, "bias", None) is not None:
        return "it has a bias"
    if weight.device.type == "meta" or missing_own(norm):
        return None
    x = _random(weight.shape[0], weight)
    got, expected = own_forward(norm, x), reference.rms_norm(x, weight, eps)
    if got.shape != expected.shape or not torch.allclose(
        got.float(), expected.float(), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6
    ):
        return "its output is not RMSNorm's"
    return None


def missing_linear(module: nn.Module) -> Reason | None:
    """Why a module is neither nn.Linear nor a class of its own (CoreNet has one) that does the same
    with its parts. A subclass of nn.Linear does something else on purpose (an adapter).
    """
    if isinstance(module, Compressed):
        return None
    kind, weight = own_class(type(module)), getattr(module, "weight", None)
    if reason := missing_own(module):
        return reason
    if kind is nn.Linear:
        computed = not isinstance(weight, nn.Parameter)
        return "its weight is computed, not a Parameter" if computed else None
    other = f"{kind.__name__} is not nn.Linear"
    parts = {name for name, _ in module.named_parameters()}
    if issubclass(kind, nn.Linear) or not parts <= {"weight", "bias"}:
        return other
    if missing_alone(module) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return other
    if weight.device.type == "meta":
        return other
    x = _random(weight.shape[1], weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        expected = F.linear(x, weight, getattr(module, "bias", None))
    return None if torch.equal(own_forward(module, x), expected) else other


def missing_silu(activation: nn.Module) -> Reason | None:
    """Why a module is no SiLU."""
    x = torch.linspace(-6, 6, 97)
    if torch.allclose(own_forward(activation, x), F.silu(x), atol=1e-6):
        return None
    return "its activation is not SiLU"


def missing_class(module: nn.Module, known: type[nn.Module] | None) -> Reason | None:
    """Why a module's class computes another thing than a class that is known; of other code (None)
    only how it is called can be told.
    """
    kind = own_class(type(module))
    if kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl:
        return f"{kind.__name__} is called in a way of its own"
    if known is None:
        return None
    if not issubclass(kind, known):
        return f"{kind.__name__} is not {known.__name__}"
    names = [n for n, f in vars(known).items() if inspect.isfunction(f) and n not in _APART]
    for name in names:
        if getattr(kind, name) is not getattr(known, name):
            return f"{kind.__name__} has a {name} of its own"
    return None


def missing_room(module: nn.Module, kind: type[Fused]) -> Reason | None:
    """Why a fused class can't stand before a class of others' code: it would hide a name of it."""
    if any(cls.__module__ == layers.__name__ for cls in own_class(type(module)).__mro__):
        return None
    for cls in kind.__mro__[: kind.__mro__.index(Fused)]:
        for name in vars(cls).keys() - vars(nn.Module).keys():
            if name.startswith("__"):
                continue
            if name in vars(module) or hasattr(own_class(type(module)), name):
                return f"its own `{name}` would be hidden"
    return None


def given_by(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module's class as it is now gives for x; None if that can't be tried without a trace:
    something hangs on a module in it, or it takes more than x.
    """
    if any(missing_plain(m) for m in module.modules()):
        return None
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), fork_rng(devices=[]):
            given = type(module).forward(module, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    given = given[0] if isinstance(given, tuple) and given else given
    return given if isinstance(given, Tensor) else None


def missing_likeness(own: Tensor | None, fused: Tensor | None) -> Reason | None:
    """Why a fused class isn't the same as a module's own, by what both gave; None if it is, or if
    one couldn't be tried.
    """
    if own is None or fused is None:
        return None
    if own.shape == fused.shape:
        # Of one value of the output: products and sums may be taken in any order.
        allowed = (8 * torch.finfo(own.dtype).eps + 1e-5) * own.abs().max()
        if (own.double() - fused.double()).abs().max() <= allowed:
            return None
    return "its output is not that of OpenELM's"


def sample(norm: nn.Module) -> Tensor | None:
    """Three tokens to try modules with, as a norm takes them; None if it has no numbers."""
    weight = getattr(norm, "weight", None)
    if not plain_tensor(weight) or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, weight.shape[0], generator=generator).to(weight)
