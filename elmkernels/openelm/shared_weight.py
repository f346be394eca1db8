"""One gradient for a weight that is both the embedding and the output projection.

autograd would make two of them, each as large as the weight, and add them: of OpenELM-270M 164 MB
of zeros, written, read and added for the few hundred rows that the embedding touches. Here the
projection's backward stores its gradient; the embedding's backward, which always runs later,
because the projection's input depends on it, adds its rows into that buffer and returns it.
"""

import torch
from torch import Tensor

from ..derivatives import once


class TiedWeightGradient:
    """The weight in one forward pass: `embed` first, then `projection`, whose input must depend on
    what `embed` returned.
    """

    def __init__(self, weight: Tensor, padding_index: int | None = None) -> None:
        self.weight, self.padding_index = weight, padding_index
        self.waiting: Tensor | None = None  # the projection's gradient

    def embed(self, ids: Tensor) -> Tensor:
        """Integer ids of any shape -> [*ids.shape, model_dim]."""
        return _Embed.apply(self.weight, ids, self)

    def projection(self) -> Tensor:
        """The weight, for the projection; the embedding's backward returns its gradient."""
        return _Projection.apply(self.weight, self)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, shared):
        ctx.save_for_backward(ids)
        ctx.shared, ctx.shape = shared, weight.shape
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dx):
        (ids,) = ctx.saved_tensors
        shared, shape = ctx.shared, ctx.shape
        waiting, shared.waiting = shared.waiting, None
        if waiting is not None and torch.is_grad_enabled():
            waiting = waiting.clone()  # somebody may differentiate it again

        def added(dx: Tensor, waiting: Tensor | None) -> Tensor:
            dweight = dx.new_zeros(shape) if waiting is None else waiting.detach()
            rows, at = dx.reshape(-1, dx.shape[-1]).to(dweight.dtype), ids.reshape(-1)
            if shared.padding_index is not None:
                rows = rows.masked_fill((at == shared.padding_index)[:, None], 0.0)
            return dweight.index_add_(0, at, rows)

        return once("linear_cross_entropy", added, dx, waiting), None, None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, shared):
        ctx.shared = shared
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dweight):
        # A gradient that someone else holds too (a second backward pass) must not be written to.
        ctx.shared.waiting = dweight
        return None, None
