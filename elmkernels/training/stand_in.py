"""The loss of a model that has no `loss` of its own yet: whole logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def loss(
    model: nn.Module,
    input_ids: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy and z_loss times the squared log of the partition function, in float32."""
    logits = model(input_ids, attention_mask, cu_seqlens=cu_seqlens).flatten(0, 1).float()
    targets = targets.flatten()
    losses = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    real = targets != ignore_index
    losses = losses + torch.where(real, z_loss * logits.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses.view(input_ids.shape)
    return losses.sum() / real.sum() if reduction == "mean" else losses.sum()
