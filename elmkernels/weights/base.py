"""What every form of a weight answers, and a plain Tensor as such a form."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import fail, floating, tensor


class Parts(NamedTuple):
    """A weight as the raw kernels take it; bits: 0 of a plain one, 8 or 4 of `Affine`, 12."""

    data: Tensor
    scales: Tensor | None
    biases: Tensor | None
    exponents: Tensor | None
    escape_starts: Tensor | None
    escape_columns: Tensor | None
    escape_values: Tensor | None
    bits: int


class Form(ABC):
    """A matrix [n, k] in one form."""

    group_size: int  # columns that share a scale; 0 if there are none
    takes_int8: bool = False  # whether it is multiplied by activations rounded to 8 bits

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the dense matrix, unless another is asked for."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def parts(self) -> Parts:
        """The tensors as kernels take them."""

    @abstractmethod
    def rows(self, begin: int, end: int) -> "Form | Tensor":
        """Rows [begin, end) in the same form."""

    @abstractmethod
    def gather(self, ids: Tensor) -> "Form | Tensor":
        """The rows that ids, integers [m], name, in the same form."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raise ValueError or TypeError if the tensors don't fit each other."""

    @property
    def indices(self) -> tuple[Tensor, ...]:
        """The tensors whose numbers kernels follow as indices."""
        return ()

    @abstractmethod
    def check_numbers(self, name: str) -> None:
        """Raise ValueError for numbers that no weight has: indices that point elsewhere, scales
        that aren't finite. It reads the data, so it is for weights that come from outside.
        """

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [n, k] that the weight stands for, in `dtype` (None: its own)."""

    @property
    def native_dtype(self) -> torch.dtype | None:
        """The one dtype in which kernels make its rows dense; None if it may be any."""
        return None

    @abstractmethod
    def takes(self, dtype: torch.dtype) -> bool:
        """Whether activations of a dtype are multiplied by it as it is."""


class Dense(Form):
    """A plain Tensor [n, k] as a form."""

    group_size = 0

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def parts(self) -> Parts:
        return Parts(self.weight, None, None, None, None, None, None, 0)

    def rows(self, begin: int, end: int) -> Tensor:
        return self.weight[begin:end]

    def gather(self, ids: Tensor) -> Tensor:
        return self.weight[ids]

    def check(self, name: str) -> None:
        floating(name, self.weight)
        if self.weight.dim() != 2:
            fail(name, "[n, k]", list(self.weight.shape))

    def check_numbers(self, name: str) -> None:
        """Any number may be a weight."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight if dtype is None else self.weight.to(dtype)

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype


def check_part(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device
) -> None:
    """Raise TypeError or ValueError for a tensor of a form that isn't as it must be."""
    tensor(name, x)
    if x.dtype != dtype:
        fail(name, dtype, x.dtype, TypeError)
    if tuple(x.shape) != tuple(shape):
        fail(name, list(shape), list(x.shape))
    if x.device != device:
        fail(name, f"on {device}", x.device)
    if not x.is_contiguous():
        fail(name, "contiguous", f"strides {x.stride()}")
