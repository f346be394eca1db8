"""A compressed weight as a tensor, for code that knows none: adapters and what initializes them.

It holds no numbers. An operation on it takes the dense matrix, made for that once; to set its
`data`, or to write into it, compresses the new matrix in the same form.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .base import Form


class AsTensor(Tensor):
    """The weight [n, k] of a module, in the dtype that the module computes in.

    Args:
        form: the weight as it is held.
        dtype: of the dense matrix.
        put: what takes another dense matrix in its place.

    Attributes:
        form, put: the same.

    Example:
        >>> weight = AsTensor(quantize_weight(w), torch.float32, put)
        >>> weight.data += delta
    """

    form: Form
    put: Callable[[Tensor], None]

    @staticmethod
    def __new__(cls, form: Form, dtype: torch.dtype, put: Callable[[Tensor], None]) -> "AsTensor":
        made = Tensor._make_wrapper_subclass(cls, form.shape, dtype=dtype, device=form.device)
        made.form, made.put = form, put
        return made

    def dense(self) -> Tensor:
        """The matrix, of its own."""
        return self.form.dense(self.dtype)

    def data_ptr(self) -> int:
        """Where the compressed numbers lie: the same for who shares them."""
        return self.form.parts().data.data_ptr()

    @property
    def data(self) -> Tensor:
        """The dense matrix; to set it compresses the new one."""
        return self.dense()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.put(value.detach())

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken: dict[int, Tensor] = {}

        def plain(x: object) -> object:
            if not isinstance(x, AsTensor):
                return x
            return taken.setdefault(id(x), x.dense())

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        first = args[0] if args else None
        if func._schema.is_mutable and isinstance(first, AsTensor):
            first.data = taken[id(first)]
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"AsTensor({list(self.shape)}, {self.dtype} of {type(self.form).__name__})"
