"""The loss of labels, as transformers counts it, by this package's fused loss."""

from typing import Any

import torch
from torch import Tensor

from ...checks import is_integer
from ...openelm import OpenELM, next_tokens
from ...openelm.compressed import weight_of
from ...openelm.loss import plain_weight
from ...openelm.shared_weight import TiedWeightGradient
from ...reference import cross_entropy
from ...surgery import plain_tensor

IGNORED = -100


def shared_gradient(body: OpenELM) -> TiedWeightGradient | None:
    """How embedding and projection share one gradient, None if they don't (see `OpenELM.loss`)."""
    if body.classifier is not None or not body._straight():
        return None
    return body.loss_head.shared_gradient(body.token_embeddings)


def _head_weight(body: OpenELM) -> Tensor | None:
    """What the projection multiplies by, None if it is more than a product with a plain matrix."""
    if not body._straight():
        return None
    if body.classifier is not None:
        return plain_weight(body.classifier)
    # The product doesn't call the embedding, whatever hangs on it (transformers hooks its output
    # for checkpointing) or wraps it (an adapter, which then answers for its weight).
    weight = weight_of(body.token_embeddings)
    return weight if isinstance(weight, Tensor) and plain_tensor(weight) else None


def _targets(labels: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The next tokens, and how their losses are added up."""
    ignored = options.get("ignore_index", IGNORED)
    targets = options.get("shift_labels")
    if targets is None:
        targets = next_tokens(labels, ignore_index=ignored)
    counted = options.get("num_items_in_batch") is not None
    return targets, {"ignore_index": ignored, "reduction": "sum" if counted else "mean"}


def _divided(loss: Tensor, options: dict[str, Any]) -> Tensor:
    items = options.get("num_items_in_batch")
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def fused(
    body: OpenELM,
    x: Tensor,
    labels: Tensor | None,
    shared: TiedWeightGradient | None,
    options: dict[str, Any],
) -> Tensor:
    """The loss of what the last layer gives.

    Args:
        body: the model.
        x: [batch, length, model_dim], before the last norm.
        labels: int64 [batch, length]; the tokens themselves, they are shifted here.
        shared: of the embedding that made x; None if it was called as a module.
        options: of forward: num_items_in_batch, shift_labels, ignore_index.

    Returns:
        float32, one number.
    """
    targets, how = _targets(labels, options)
    weight = _head_weight(body) if shared is None else shared.projection()
    loss = body.loss_head(body.norm(x), targets.to(x.device), weight, body.project, **how)
    return _divided(loss, options)


def of_logits(logits: Tensor, labels: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The same of logits [batch, length, vocab_size]."""
    targets, how = _targets(labels, options)
    return _divided(cross_entropy(logits, targets.to(logits.device), **how), options)


def positions_kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """The positions of x [batch, length, ...] that get logits.

    Args:
        x: what is sliced.
        keep: how many of the last, 0 for all; positions [n] of every row, or [batch, n] of each;
            or bool [batch, length], whose positions come one after another as [n, ...].

    Returns:
        What is kept.
    """
    if is_integer(keep):
        return x[:, -keep:]
    if keep.dim() == 2:
        return x[keep] if keep.dtype == torch.bool else x.take_along_dim(keep[..., None], dim=1)
    return x[:, keep]
