"""Projections: the matrix products are borrowed from torch, by the routines of a plan (`routines`).

A prepacked copy (oneDNN's own blocked layout) stands beside the weight, which streams and gradients
go on reading, and so costs its memory again: it is made when a weight has multiplied as many rows
as pay for it, and by default only if it was measured to pay and much more memory is free (`swap`).
It belongs to the weight, not to a caller, and is used for one state of the weight only: its
version, address and dtype are compared at every call (a load, a move, most optimizers), and because
fused optimizers don't count versions, so are the steps of all optimizers. Whoever uses the weight
with gradients drops the copy, the loss as well, and none is made or used while the weight has a
gradient. By choice it stands instead of the weight, which is made again for whoever asks for it
(`weights.prepacked`). A write through `weight.data` (merging an adapter) torch doesn't see: some
numbers of the weight are compared for it, which one that changes few of them may miss: `accelerate`
again then.
"""

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..derivatives import unusual
from ..openelm import layers
from ..openelm.compressed import product
from ..surgery import has_tensor_hooks, known, plain_tensor
from ..weights.formats import Weight, form_of
from ..weights.prepacked import Held, Prepacked, parameters_of, prepacked_bytes, prepacked_copy
from .classes import Fused, setting, while_fused
from .routines import (
    LINEAR,
    MV,
    ONEDNN,
    PREPACKED,
    STREAM,
    Plan,
    mv,
    onednn,
    onednn_takes,
    stream,
)


class _OneDNNLinear(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, each by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight):
        # A frozen weight (an adapter's base) needs no input.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        y = onednn(x, weight)
        # A view that a Function returns can't be written to in place, as some hooks do.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # oneDNN's products can't be differentiated again, torch's can.
        multiply = F.linear if torch.is_grad_enabled() else onednn
        dx = multiply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = multiply(dy.flatten(0, -2).t(), x.flatten(0, -2).t())
        return dx, dweight


class _AutocastLinear(torch.autograd.Function):
    """The product under autocast. F.linear keeps the narrow copy of the weight until its backward;
    this makes it again from the weight itself: of OpenELM-270M 440 MB less, for half a pass over
    the weights.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype):
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(dtype))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
        return dx, dweight, None


class Linear(Fused):
    """nn.Linear with the plan's routines; its state are its Products."""

    _fused: "Products"
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def products(self) -> "Products":
        """The routines."""
        return self._fused

    @property
    def plan(self) -> Plan:
        """Which routines they are."""
        return self._fused.plan

    @while_fused
    def forward(self, x: Tensor) -> Tensor:
        if self._fused.alone and not torch.compiler.is_compiling():
            held = self.hold(x)
            if held is not None:
                return onednn(x, held.packed)
        weight = self.weight
        if self.bias is not None or not plain_tensor(weight):
            return super().forward(x)
        return self._fused(x, weight)

    def hold(self, x: Tensor | None = None) -> Held | None:
        """The weight, held prepacked alone from now on; None if it can't be, or must be dense for
        a product with x.
        """
        own = parameters_of(self)
        if type(own) is not Prepacked:
            own = vars(self)["_parameters"] = Prepacked(own)
        facts = own.facts
        if self.bias is not None or facts is None or _waited_for(own):
            return None
        dtype, trained = facts
        if x is not None and (
            unusual()
            or _by_torch(x, dtype)
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and (x.requires_grad or trained))
        ):
            return None
        return own.hold() if onednn_takes(dtype) else None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._fused.drop()
            own = parameters_of(self)
            if isinstance(own, Prepacked):
                own.dense()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._fused.plan}"


def _waited_for(parameters: Prepacked) -> bool:
    """Whether something hangs on a weight that is dense now."""
    weight = dict.get(parameters, "weight")
    return weight is not None and has_tensor_hooks(weight)


def hold_all(model: nn.Module) -> list[int]:
    """Hold the weights of projections prepacked alone that may be, one at a time. Returns the bytes
    of each, 0 if it stays dense.
    """
    found = []
    for module in model.modules():
        if isinstance(module, Linear) and module.products.alone:
            held = module.hold()
            found.append(0 if held is None else prepacked_bytes(held.packed))
    return found


@dataclass
class HeadState:
    """What a fused tied head needs: its routines; backend and activations of `ops.linear` for a
    compressed weight.
    """

    products: "Products"
    backend: str | None
    activations: str | None = None


@known
class TiedHead(Fused, layers.TiedHead):
    """The output projection by the embedding's weight, with the plan's routines; a compressed one
    is multiplied by a backend of `ops.linear`.
    """

    _fused: HeadState
    products, backend = setting("products"), setting("backend")

    @while_fused
    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        if not isinstance(weight, Tensor):
            state = self._fused
            rounds = state.activations if form_of(weight).takes_int8 else None
            return product(x, weight, backend=state.backend, activations=rounds)
        if not plain_tensor(weight):
            return super().forward(x, weight)
        return self._fused.products(x, weight)

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._fused.products.drop()
        return super().train(mode)


class _Copy(NamedTuple):
    state: tuple[Any, ...]
    sample: Tensor  # some of the weight's numbers, for who writes through `weight.data`
    tensor: Tensor


# Prepacked copies, by their weights: whoever uses a weight for training can drop its copy.
_COPIES: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()
_steps = [0]  # of any optimizer in this process


@cache
def _watch_optimizers() -> None:
    """Count the steps of all optimizers: fused ones write weights without counting a version."""

    def count(*_: object) -> None:
        _steps[0] += 1

    register_optimizer_step_post_hook(count)


def forget(weight: Tensor) -> None:
    """Drop the prepacked copy of a weight: it is about to be trained."""
    if _COPIES:
        _COPIES.pop(weight, None)


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """What changes if a weight's numbers do, as far as torch tells."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape, _steps[0]


def _sample(weight: Tensor) -> Tensor:
    """Some 64 numbers from all over a weight [n, k], compared at every call."""
    n, k = weight.shape
    return weight.detach()[:: max(1, n // 8), :: max(1, k // 8)]


# Rows of a call from which on it takes a copy that nobody asked for: to make one takes as long as
# some products of few rows gain by it. A long prompt makes one, a short one and a batch that
# decodes don't. A call's own rows alone decide: the same call gives the same bits whatever came
# before it.
PATIENCE = 128


class Products:
    """x @ weight.T by a plan, with a prepacked copy of the weight if the plan asks for it.
    backend: of `ops.linear`. patience: a call of fewer rows goes without the copy. alone: whether
    the copy stands instead of the weight.
    """

    def __init__(
        self, plan: Plan, backend: str | None = None, patience: int = 0, alone: bool = False
    ) -> None:
        self.plan, self.backend, self.patience, self.alone = plan, backend, patience, alone
        self._weight: weakref.ref[Tensor] | None = None  # the last that was prepacked here

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if unusual():
            return F.linear(x, weight)
        if _autocast_training(x, weight):
            with torch.autocast(x.device.type, enabled=False):
                return _AutocastLinear.apply(x, weight, torch.get_autocast_dtype("cpu"))
        if _by_torch(x, weight.dtype):
            return F.linear(x, weight)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            forget(weight)
            named = self.plan.training == ONEDNN and onednn_takes(x.dtype)
            if named and not torch.is_autocast_enabled("cpu"):
                return _OneDNNLinear.apply(x, weight)
            return F.linear(x, weight)
        rows = x.numel() // x.shape[-1]
        routine = self.plan.of_rows(rows)
        if routine == LINEAR or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight)
        if routine == MV:
            return mv(x, weight)
        if routine == STREAM:
            return stream(x, weight, self.backend)
        if not onednn_takes(x.dtype):  # the plan is of another dtype
            return F.linear(x, weight)
        if weight.grad is not None or not self.plan.prepacks:
            self.drop()
        elif routine == PREPACKED:
            if rows < self.patience:
                return F.linear(x, weight)
            return onednn(x, self.prepacked(weight))
        return onednn(x, weight)

    def prepacked(self, weight: Tensor) -> Tensor:
        """The prepacked copy of this very state of the weight."""
        _watch_optimizers()
        state, found = _state_of(weight), _COPIES.get(weight)
        sample = _sample(weight)
        if found is None or found.state != state or not torch.equal(found.sample, sample):
            found = _COPIES[weight] = _Copy(state, sample.clone(), prepacked_copy(weight))
        self._weight = weakref.ref(weight)
        return found.tensor

    def _last(self) -> Tensor | None:
        return None if self._weight is None else self._weight()

    def drop(self) -> None:
        """Forget the copy that was made here, if there is one."""
        weight, self._weight = self._last(), None
        if weight is not None:
            forget(weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the prepacked copy, as long as there is one."""
        weight = self._last()
        found = None if weight is None else _COPIES.get(weight)
        return 0 if found is None or weight is None else weight.nbytes

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layout can't be pickled or deep-copied: a copy prepacks again at its first call.
        return vars(self) | {"_weight": None}


def _by_torch(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product with a weight of a dtype is F.linear's, whatever the plan is."""
    return (
        torch.compiler.is_compiling()  # Inductor makes its own choice
        or x.dtype != dtype  # autocast
        or x.device.type != "cpu"
        or x.numel() == 0
    )


def _autocast_training(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch.is_autocast_enabled("cpu")
        and weight.dtype == torch.float32
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.numel() > 0
    )
