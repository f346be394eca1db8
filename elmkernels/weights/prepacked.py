"""A projection's weight in a library's own layout (oneDNN's), beside the dense one or instead.

`Prepacked` stands in the place of a module's dict of Parameters. While its weight is held in the
library's layout alone, the dense Parameter is nowhere; whoever asks the dict for it (`.weight`,
`state_dict`, a move, an optimizer, a copy of the module) gets it made again, with the same bits:
the layout is a permutation and some padding. What is asked for is dense until the next product.
Nothing that anybody still has is taken: a Parameter that someone else keeps, or whose memory
another tensor shares, stays, as it may be written to.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAME = "weight"
_BITS = {2: torch.int16, 4: torch.int32}
_LOCK = threading.RLock()  # two threads may call one model


def prepacked_copy(weight: Tensor) -> Tensor:
    """A copy of weight [n, k] in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def prepacked_bytes(packed: Tensor) -> int:
    """Bytes of a prepacked copy, its padding as well."""
    return torch.ops.mkldnn._nbytes(packed)


def dense_of(packed: Tensor) -> Tensor:
    """The dense matrix [n, k] that a copy was made of, bit by bit."""
    return packed.to_dense()


# The layout moves numbers, whatever they are, so that a trial of a shape is one of all its weights.
# A trial of as many rows beyond a multiple of this takes less memory than the copy of a large one.
_TRIED_ROWS = 1024


@cache
def _exact(dtype: torch.dtype, rows: int, columns: int, threads: int) -> bool:
    """Whether copies of a shape can be turned back bit by bit, by a matrix of all kinds of bits."""
    kind = _BITS[dtype.itemsize]
    most, generator = 1 << (8 * dtype.itemsize - 1), torch.Generator().manual_seed(0)
    bits = torch.randint(
        -most, most, (rows, columns), generator=generator, dtype=kind, device="cpu"
    )
    again = dense_of(prepacked_copy(bits.view(dtype)))
    return again.shape == bits.shape and torch.equal(again.view(kind), bits)


def _can_be_turned_back(weight: Tensor) -> bool:
    rows, columns = weight.shape
    if rows >= 2 * _TRIED_ROWS:
        rows = _TRIED_ROWS + rows % _TRIED_ROWS
    return _exact(weight.dtype, rows, columns, torch.get_num_threads())


@cache
def _trim() -> Callable[[int], object] | None:
    """glibc's malloc_trim, if this is glibc."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def _give_back() -> None:
    """Give freed memory back to the system: of matrices below 32 MiB glibc keeps much of it."""
    if (trim := _trim()) is not None:
        trim(0)


def _users(x: Tensor) -> int:
    """How many tensors and storages use the memory of a tensor, itself among them."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _shared(x: Tensor) -> bool:
    """Whether another tensor uses the memory that x alone fills."""
    alone = _users(torch.empty(1, device="cpu"))
    return x.untyped_storage().nbytes() == x.nbytes and _users(x) > alone


class Held(NamedTuple):
    """A weight that is held prepacked alone, and what its Parameter was beside its numbers."""

    packed: Tensor
    dtype: torch.dtype
    requires_grad: bool
    attributes: dict[str, Any]

    def parameter(self, dense: Tensor) -> nn.Parameter:
        """The Parameter again, of a dense matrix."""
        made = nn.Parameter(dense, self.requires_grad)
        vars(made).update(self.attributes)
        return made


def missing_alone(weight: object) -> str | None:
    """Why a weight can't be held prepacked alone, or None."""
    if type(weight) is not nn.Parameter:
        return f"it is a {type(weight).__name__}, no plain Parameter"
    if weight.device.type != "cpu" or weight.element_size() not in _BITS or weight.numel() == 0:
        return f"it is {weight.dtype} on {weight.device}"
    if weight.dim() != 2 or not weight.is_contiguous():
        return "it is no contiguous matrix"
    if weight.grad is not None:
        return "it has a gradient"
    return None


class Prepacked(dict[str, Any]):
    """A module's Parameters, whose `weight` may be held prepacked alone. What reads them as a dict
    finds them as they were; `dict.values(self)` alone reads past a weight that is held.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self._held: Held | None = None

    @property
    def facts(self) -> tuple[torch.dtype, bool] | None:
        """The weight's dtype and whether it requires gradients, without asking for it; None if
        there is none.
        """
        found = dict.get(self, NAME)
        found = self._held if found is None else found
        return None if found is None else (found.dtype, found.requires_grad)

    def hold(self) -> Held | None:
        """The weight, held prepacked alone from now on; None if it must stay dense."""
        held = self._held
        if held is None or dict.get(self, NAME) is not None:
            with _LOCK, torch.inference_mode(False), torch.no_grad():
                if dict.get(self, NAME) is not None:
                    self._drop()
                    if dict.get(self, NAME) is None:
                        _give_back()
                held = None if dict.get(self, NAME) is not None else self._held
        return held

    def _drop(self) -> None:
        weight: Any = dict.get(self, NAME)
        if missing_alone(weight) is not None:
            return
        # Shares the memory. If the Parameter ends as this dict lets it go, nobody else has it.
        alias = weight.detach()
        found = Held(alias, weight.dtype, weight.requires_grad, vars(weight).copy())
        asked = weakref.ref(weight)
        del weight
        self._held = None
        try:
            super().__setitem__(NAME, None)
            if asked() is None and not _shared(alias) and _can_be_turned_back(alias):
                self._held = found._replace(packed=prepacked_copy(alias))
        finally:
            if self._held is None:
                live = asked()
                super().__setitem__(NAME, found.parameter(alias) if live is None else live)

    def dense(self) -> None:
        """Make the weight dense again, if it is held."""
        if dict.get(self, NAME) is not None:
            return
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            held = self._held
            if held is not None and dict.get(self, NAME) is None:
                super().__setitem__(NAME, held.parameter(dense_of(held.packed)))
                self._held = held = None
                _give_back()

    def __getitem__(self, name: str) -> Any:
        if name == NAME:
            self.dense()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __setitem__(self, name: str, value: Any) -> None:
        with _LOCK:
            super().__setitem__(name, value)
            if name == NAME:
                self._held = None

    def __delitem__(self, name: str) -> None:
        with _LOCK:
            super().__delitem__(name)
            if name == NAME:
                self._held = None

    def __iter__(self) -> Any:  # with one of its own, dict(self) reads by __getitem__
        return super().__iter__()

    def __reversed__(self) -> Any:
        return super().__reversed__()

    def items(self) -> Any:
        self.dense()
        return super().items()

    def values(self) -> Any:
        self.dense()
        return super().values()

    def pop(self, name: str, *default: Any) -> Any:
        self.dense()
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        self.dense()
        return super().popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *others: Any, **named: Any) -> None:
        for name, value in dict(*others, **named).items():
            self[name] = value

    def clear(self) -> None:
        with _LOCK:
            super().clear()
            self._held = None

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The library's layout can't be pickled or deep-copied: a copy has dense weights.
        return dict, (dict(self),)


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's dict of Parameters as it is, which nothing has asked for a weight."""
    return vars(module)["_parameters"]


def held_of(module: nn.Module) -> Held | None:
    """The weight of a module as it is held prepacked alone, or None: it is not asked for."""
    found = parameters_of(module)
    if type(found) is not Prepacked or dict.get(found, NAME) is not None:
        return None
    return found._held


def plain_parameters(module: nn.Module) -> None:
    """Give a module a plain dict of Parameters again, all dense, if it has a `Prepacked` one."""
    found = parameters_of(module)
    if type(found) is Prepacked:
        vars(module)["_parameters"] = dict(found)
