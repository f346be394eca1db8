"""Which backend an op on rows takes where the caller names none: on a GPU, few rows take another.

Of few rows the time is what the launch costs, of many the memory. On a CPU backends.PREFERENCE
decides alone.
"""

import torch
from torch import Tensor

from ..backends import choose
from ._attention_choice import Preference

FEW_ROWS = 16
_LAUNCH = (
    "reasoned, not measured: a Triton launch costs tens of us of host time, a C++ one about 5; "
    "inside a CUDA graph they are equal"
)
# For each device where few rows have an order of their own. Gradients have none: a training step
# has more rows than these.
FEW: dict[str, Preference] = {"cuda": Preference(("cuda", "triton"), _LAUNCH)}


def rows_backend(op: str, named: str | None, x: Tensor, *weights: Tensor | None) -> str:
    """The backend of a call on x [..., n]: the named one, or the first that can run here in the
    order for x's device, its number of rows, and whether x or a weight asks for a gradient.
    """
    device = x.device.type
    if named is None and device in FEW and x.numel() <= FEW_ROWS * x.shape[-1]:
        wants = any(t is not None and t.requires_grad for t in (x, *weights))
        if not (wants and torch.is_grad_enabled()):
            return choose(op, device, None, FEW[device].order)
    return choose(op, device, named)


def described(op: str, device: str, named: str | None) -> str:
    """What such an op takes on a device, in words: "cuda up to 16 rows, then triton"."""
    many = choose(op, device, named)
    few = choose(op, device, named, FEW[device].order if device in FEW else ())
    return many if few == many else f"{few} up to {FEW_ROWS} rows, then {many}"
