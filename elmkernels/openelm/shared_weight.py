"""One gradient for a weight that is both the embedding and the output projection.

autograd would make two of them, each as large as the weight, and add them: of OpenELM-270M 164 MB
of zeros, written, read and added for the few hundred rows that the embedding touches. Here the
projection's gradient waits for the embedding's backward, which runs last of all, because the
projection's input depends on it, and which adds its rows into it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tied:
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
        """The weight, for the projection; its gradient goes the way of the embedding."""
        return _Projection.apply(self.weight, self)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, tied):
        ctx.save_for_backward(ids)
        ctx.tied, ctx.shape = tied, weight.shape
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        (ids,) = ctx.saved_tensors
        tied = ctx.tied
        dweight, tied.waiting = tied.waiting, None
        if dweight is None:
            dweight = dx.new_zeros(ctx.shape)
        rows, ids = dx.reshape(-1, dx.shape[-1]).to(dweight.dtype), ids.reshape(-1)
        if tied.padding_index is not None:
            rows = rows.masked_fill((ids == tied.padding_index)[:, None], 0.0)
        return dweight.index_add_(0, ids, rows), None, None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, tied):
        ctx.tied = tied
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dweight):
        # A gradient that someone else holds too (a second backward pass) must not be written to.
        ctx.tied.waiting = dweight
        return None, None
