"""What mutated kernels are made of: rounding, sums and gradients that are a little wrong."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def through(value: Tensor, other: Tensor) -> Tensor:
    """value, whose gradient is other's."""
    return value.detach() + (other - other.detach())


def truncated(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored towards zero; float32 loses six bits."""
    near = wide.detach().to(dtype)
    if dtype == torch.float32:
        return through((near.contiguous().view(torch.int32) & -64).view(dtype), wide)
    down = torch.nextafter(near, torch.zeros_like(near))
    found = torch.where(near.float().abs() > wide.detach().float().abs(), down, near)
    return through(found, wide.to(dtype))


def short(x: Tensor) -> Tensor:
    """The 11 bits that a tensor core takes of each float32."""
    if x.dtype != torch.float32:
        return x
    return through((x.detach().contiguous().view(torch.int32) & -8192).view(x.dtype), x)


def coarse(x: Tensor) -> Tensor:
    """Rounded to bfloat16, in whatever dtype."""
    return through(x.detach().bfloat16().to(x.dtype), x)


def in_parts(part: Callable[[slice], Tensor], n: int, size: int = 16) -> Tensor:
    """The sum of the parts of n columns with an accumulator no wider than they are."""
    found = part(slice(0, size))
    for start in range(size, n, size):
        found = found + part(slice(start, start + size))
    return found


def without_last_row(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight for each row, of which the last gives no gradient."""
    rows = weight.expand(math.prod(shape[:-1]), -1)
    return torch.cat((rows[:-1], rows[-1:].detach())).view(shape)


def row_by_row(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight for each row: their gradients are added one by one, in its dtype."""
    found = [weight * 1 for _ in range(math.prod(shape[:-1]))]
    return torch.stack(found).view(shape)
