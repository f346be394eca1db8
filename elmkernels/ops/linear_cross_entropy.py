"""linear_cross_entropy: the output projection and its loss, without logits in memory. For a token

    loss = lse - (1 - e) x[target] - e mean(x) + z lse^2,   x = round(weight hidden),
    dx_j = dloss ((1 + 2 z lse) softmax(x)_j - (1 - e) [j = target] - e / v),

with lse = logsumexp(x), e the label smoothing, z the z-loss; an ignored token has neither. Rows go
through in chunks (see `chunked_loss`). A sum or a mean makes its gradients in the forward pass, for
dloss = 1, so that there are three products in all; the backward pass scales them and gives those
buffers away. A second one, over a retained graph, makes the products again, as the backward of
reduction "none" always does.
"""

import torch
from torch import Tensor

from .. import reference
from ..backends import CPU, REFERENCE, Traits, choose, define
from ..derivatives import Derivative, once, unusual
from ._chunked_loss import run
from ._flops import counted
from ._linear_cross_entropy import check_loss, check_targets, joined

define(
    "linear_cross_entropy",
    backends=(*CPU, "triton"),
    traits=Traits(falls_back=True),
    rows=(
        "(Tensor(a!) logits, Tensor targets, Tensor? dloss, int ignore_index, float z_loss, "
        "float label_smoothing, bool grad) -> Tensor",
        lambda logits, targets, *_: logits.new_empty(targets.shape, dtype=torch.float32),
    ),
    add=("(Tensor(a!) total, Tensor share, Tensor? scale, bool fresh) -> ()", lambda *_: None, CPU),
)
counted("linear_cross_entropy")  # its products are those of `_chunked_loss`


class _Losses(Derivative):
    """The loss of every row."""

    op = "linear_cross_entropy"

    @staticmethod
    def forward(hidden, weight, targets, ignore_index, z_loss, smoothing, backend):
        options = ignore_index, z_loss, smoothing
        return run(hidden, weight, targets, None, *options, False, False, backend)[0]

    @staticmethod
    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        *ctx.options, ctx.backend = inputs[3:]

    @staticmethod
    def backward(ctx, dloss):
        return _again(ctx, dloss.contiguous())


class _Sum(torch.autograd.Function):
    """The sum of the losses. What it makes in forward and gives away in backward no compiler would
    follow: traced, it is kept as any saved tensor is. Transforms take the sum of _Losses.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, *options):
        *ctx.options, ctx.backend = options
        ctx.made, ctx.dtype = None, weight.dtype
        wanted = ctx.needs_input_grad[:2]
        losses, dh, dw = run(hidden, weight, targets, None, *ctx.options, *wanted, ctx.backend)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(hidden, weight, targets, dh, *dw)
        else:
            ctx.save_for_backward(hidden, weight, targets)
            ctx.made = dh, dw
        return losses.sum()

    @staticmethod
    def backward(ctx, dloss):
        _, _, targets, *made = ctx.saved_tensors
        if made:
            dh, *dw = (x * dloss for x in made)
            return _as_wanted(ctx, dh, joined(dw, ctx.dtype, ctx.backend))
        if ctx.made is None or torch.is_grad_enabled():
            return _again(ctx, dloss.expand(len(targets)).contiguous())
        (dh, dw), ctx.made = ctx.made, None
        return _as_wanted(ctx, dh.mul_(dloss), joined(dw, ctx.dtype, ctx.backend, dloss))


def _again(ctx, dloss: Tensor) -> tuple:
    """The gradients by all three products."""
    kept, wanted = ctx.saved_tensors[:3], ctx.needs_input_grad[:2]
    arguments = *kept, dloss, *ctx.options, *wanted, ctx.backend
    return _as_wanted(ctx, *once("linear_cross_entropy", _gradients, *arguments))


def _gradients(hidden, weight, targets, dloss, *options) -> tuple[Tensor, Tensor | None]:
    _, dh, dw = run(hidden, weight, targets, dloss, *options)
    return dh, joined(dw, weight.dtype, options[-1])


def _as_wanted(ctx, dhidden: Tensor, dweight: Tensor | None) -> tuple:
    of_hidden, of_weight = ctx.needs_input_grad[:2]
    gradients = dhidden if of_hidden else None, dweight if of_weight else None
    return *gradients, *(None for _ in ctx.needs_input_grad[2:])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden weight^T) at targets; the logits never lie in memory at once.

    Args:
        hidden: [..., d] float32, bfloat16 or float16, any strides; copied if its rows can't be one
            list.
        weight: [v, d] in hidden's dtype or float32; it is multiplied in hidden's dtype and gets its
            gradient in its own. Under autocast both are multiplied in autocast's dtype.
        targets: int64 [...], each in [0, v) or ignore_index.
        ignore_index: the target of tokens whose loss is 0, without gradients.
        z_loss: what the square of each token's logsumexp is multiplied by and added; at least 0.
        label_smoothing: as F.cross_entropy's, in [0, 1].
        reduction: "none", "sum", or "mean" over the tokens that aren't ignored.
        backend: a backend by its name, which never falls back; None for the best here.

    Returns:
        float32, the losses [...] ("none") or one number: 0 with gradients 0 if all are ignored.
        Differentiable by hidden and weight.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. A target
            out of range raises on a CPU alone: on a GPU its loss and gradients are NaN.
        RuntimeError: the named backend can't run here.

    Example:
        >>> hidden, weight = torch.randn(5, 64), torch.randn(100, 64, requires_grad=True)
        >>> loss = elmkernels.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4, -100]))
        >>> loss.backward()
    """
    check_loss(hidden, weight, targets, ignore_index, z_loss, label_smoothing, reduction)
    ignore_index = int(ignore_index)
    kind = hidden.device.type
    backend = choose("linear_cross_entropy", kind, backend)
    if backend == REFERENCE:
        if kind == "cpu" and not torch.compiler.is_compiling():
            check_targets(targets, ignore_index, weight.shape[0])
        return reference.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss,
            label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        weight = weight if weight.dtype == torch.float32 else weight.to(hidden.dtype)
    rows, flat = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1).contiguous()
    options = ignore_index, float(z_loss), float(label_smoothing)
    wants = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    call = rows, weight, flat, *options, backend
    if wants and reduction != "none" and not unusual():
        total = _Sum.apply(*call)
    else:
        if unusual():
            losses = _Losses.transformed(*call)
        elif wants:
            losses = _Losses.apply(*call)
        else:
            losses = run(*call[:3], None, *options, False, False, backend)[0]
        if reduction == "none":
            return losses.view(targets.shape)
        total = losses.sum()
    return total if reduction == "sum" else total / (flat != ignore_index).sum().clamp(min=1)
