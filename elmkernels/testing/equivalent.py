"""The reference, evaluated in other ways that are as right: what is summed comes in another order.

An op's `OpSpec.reordered` takes its arguments in a random order of everything that its formula sums
(columns, rows, keys, heads of a group, vocabulary), asks the reference, and puts the results back
in place. In exact arithmetic that changes nothing, forward or backward; in a working dtype it is
another sample of the reference's error. `parity` takes the largest of several as its yardstick.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Orders:
    """Random orders, repeatable from their seed: `orders(n)` is one of n things."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def __call__(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device)

    def pairs(self, n: int) -> Tensor:
        """An order of n things that keeps those n / 2 apart in pairs: gate and up, the two
        coordinates that RoPE rotates."""
        half = self(n // 2)
        return torch.cat((half, half + n // 2))

    def within(self, size: int, n: int) -> Tensor:
        """An order of n things that keeps each `size` neighbours together."""
        return torch.cat([i + self(min(size, n - i)) for i in range(0, n, size)])

    def heads(self, kv_heads: int, group: int) -> Tensor:
        """An order of the query heads within the group that shares a key head."""
        return torch.cat([group * i + self(group) for i in range(kv_heads)])

    def scale(self, dtype: torch.dtype) -> float:
        """A factor that a norm undoes: all of its roundings are others, few columns or many. It
        rounds its inputs too, by half a unit in the last place at most, which float32 doesn't
        feel beside its sums; a half type would, so that there it is 1."""
        drawn = self.factor()
        return drawn if dtype.itemsize >= 4 else 1.0

    def factor(self) -> float:
        """Between 1 and 2: at another scale all roundings are others."""
        return 1 + float(torch.rand((), generator=self.generator))

    def coin(self) -> bool:
        return bool(torch.randint(2, (), generator=self.generator))


def take(x: Tensor, *orders: Tensor | None) -> Tensor:
    """x with its dimensions, from the first on, in these orders."""
    for dim, order in enumerate(orders):
        if order is not None:
            x = x.index_select(dim, order)
    return x


def put_back(x: Tensor, *orders: Tensor | None) -> Tensor:
    """What `take` took apart, in its place again."""
    return take(x, *(order if order is None else order.argsort() for order in orders))


def flat_rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """value, whose gradient is that of another tensor."""
    return value.detach() + (of - of.detach())


def reordered(function: Callable, seed: int) -> Callable:
    """An op's `OpSpec.reordered` in a random order, under its reference's own signature."""

    def run(*args, **kwargs):
        device = next(a for a in args if isinstance(a, Tensor)).device
        return function(Orders(seed, device), *args, **kwargs)

    return run
