"""Cross-entropy of softmax(hidden weight^T), with z-loss and label smoothing, over logits that lie
in memory: rounded to the dtype of hidden, then float32 (float64 for float64) all the way.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """logits [..., v], targets int64 [...] -> float32: see `linear_cross_entropy`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    rows, flat = wide.reshape(targets.numel(), wide.shape[-1]), targets.reshape(-1)
    losses = F.cross_entropy(
        rows, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    real = flat != ignore_index
    if z_loss:
        losses = losses + z_loss * rows.logsumexp(-1).square() * real
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / real.sum().clamp(min=1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    """hidden [..., d], weight [v, d] in hidden's dtype or float32, targets int64 [...], the options
    of `cross_entropy` -> the loss of each target, their sum, or their mean (0 of no targets).
    """
    return cross_entropy(F.linear(hidden, weight.to(hidden.dtype)), targets, **options)
