"""Which backend an op on rows takes if the caller names none: on a GPU, few rows take another."""

import torch
from torch import Tensor

from ..backends import FEW, FEW_ROWS, choose


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
