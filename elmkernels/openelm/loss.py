"""Losses of a language model, and the module that makes them of hidden states."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ..reference import cross_entropy
from ..surgery import known, plain
from .compressed import Compressed
from .shared_weight import TiedWeightGradient


@known
class LossHead(nn.Module):
    """Projection and cross-entropy, the logits lying in memory; it has no parameters of its own.

    `accelerate` gives it a class that makes no logits.

    Example:
        >>> head, hidden = LossHead(), torch.randn(1, 4, 256, dtype=torch.bfloat16)
        >>> loss = head(hidden, next_tokens(input_ids), None, model.project)
    """

    def shared_gradient(self, embedding: nn.Module) -> TiedWeightGradient | None:
        """How embedding and projection share one gradient.

        Args:
            embedding: the module of the tied weight.

        Returns:
            None: they don't.
        """
        return None

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        project: Callable[[Tensor], Tensor],
        **options,
    ) -> Tensor:
        """The loss of hidden states.

        Args:
            hidden: [..., model_dim].
            targets: int64 [...].
            weight: what the projection multiplies by; None if it is more than a product with a
                plain matrix.
            project: hidden states to logits.
            options: of `reference.cross_entropy`: ignore_index, z_loss, label_smoothing, reduction.

        Returns:
            float32: one number, or with reduction "none" [...].
        """
        return cross_entropy(project(hidden), targets, **options)


def plain_weight(head: nn.Module) -> Tensor | None:
    """The matrix of an embedding or a projection that is a product with it and nothing more, else
    None.
    """
    if not plain(head) or not isinstance(head, nn.Linear | nn.Embedding):
        return None
    if isinstance(head, Compressed):
        return None
    return head.weight if getattr(head, "bias", None) is None else None


def next_tokens(
    input_ids: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The targets of predicting each position's next token.

    Args:
        input_ids: integers [batch, length].
        attention_mask: [batch, length], 1 = real and 0 = padding; None if all are real.
        ignore_index: the target of the last position, and wherever a token or its next isn't real.

    Returns:
        int64 [batch, length].

    Example:
        >>> next_tokens(torch.tensor([[1, 2, 3]]))
        tensor([[   2,    3, -100]])
    """
    targets = F.pad(input_ids[:, 1:].long(), (0, 1), value=ignore_index)
    if attention_mask is None:
        return targets
    real = attention_mask.bool()
    return targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1))), ignore_index)


def next_token_loss(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy, in float32, of predicting input_ids[:, 1:] from logits[:, :-1].

    Args:
        logits: [batch, length, vocab_size].
        input_ids: integers [batch, length].
        attention_mask: [batch, length]; with one, only pairs of two real tokens count.

    Returns:
        float32, one number; 0 if no pair counts.

    Raises:
        ValueError: the shapes don't fit.

    Example:
        >>> loss = next_token_loss(model(input_ids), input_ids)
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
