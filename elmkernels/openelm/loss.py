"""Losses of a language model, and the module that makes them of hidden states."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ..reference import cross_entropy
from .shared_weight import TiedWeightGradient
from .surgery import unhooked


class LossHead(nn.Module):
    """Projection and cross-entropy, the logits lying in memory; no parameters of its own.

    weight: what the projection multiplies by, None where it is more than a product with a plain
    matrix; project: hidden states to logits. options: of `reference.cross_entropy`.
    """

    def shared_gradient(self, embedding: nn.Module) -> TiedWeightGradient | None:
        """How embedding and projection share one gradient; None if they don't."""
        return None

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        project: Callable[[Tensor], Tensor],
        **options,
    ) -> Tensor:
        return cross_entropy(project(hidden), targets, **options)


def plain_weight(head: nn.Module) -> Tensor | None:
    """The matrix of an embedding or a projection that is a product with it and nothing more, else
    None. A class of its own (an adapter, a compressed weight) says so by `plain_matrix = True`.
    """
    kind = type(head)
    plain = kind in (nn.Embedding, nn.Linear) or getattr(kind, "plain_matrix", False)
    if not plain or not unhooked(head) or getattr(head, "bias", None) is not None:
        return None
    return head.weight


def next_tokens(
    input_ids: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """int64 targets like input_ids [batch, length]: each position's next token, `ignore_index` at
    the last position and, with an attention_mask, wherever one of the two isn't real.
    """
    targets = F.pad(input_ids[:, 1:].long(), (0, 1), value=ignore_index)
    if attention_mask is None:
        return targets
    real = attention_mask.bool()
    return targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1))), ignore_index)


def next_token_loss(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy, in float32, of predicting input_ids[:, 1:] from logits[:, :-1]. With an
    attention_mask only the pairs of two real tokens count; 0 where there is none.
    """
    batch, length, vocab = logits.shape
    if input_ids.shape != (batch, length):
        raise ValueError(f"input_ids must be {[batch, length]}, got {list(input_ids.shape)}")
    targets = input_ids[:, 1:].long()
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be {[batch, length]}, got {list(attention_mask.shape)}"
            )
        real = attention_mask.bool()
        targets = targets.masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    losses = F.cross_entropy(
        logits[:, :-1].reshape(-1, vocab).float(), targets.reshape(-1), reduction="sum"
    )
    return losses / (targets != -100).sum().clamp(min=1)
