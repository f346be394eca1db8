"""What linear_cross_entropy asks of its arguments."""

import torch

from ..checks import fail, floating, integers, is_integer, number


def check_loss(hidden, weight, targets, ignore_index, z_loss, label_smoothing, reduction) -> None:
    floating("hidden", hidden)
    floating("weight", weight)
    if hidden.dim() == 0:
        fail("hidden", "[..., d]", "a scalar")
    d = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != d or weight.shape[0] == 0:
        fail("weight", f"[v, {d}] with v > 0", list(weight.shape))
    if weight.dtype not in (hidden.dtype, torch.float32):
        fail("weight", f"{hidden.dtype} like hidden, or torch.float32", weight.dtype, TypeError)
    if weight.device != hidden.device:
        fail("weight", f"on {hidden.device} like hidden", weight.device)
    integers("targets", targets, hidden.device)
    if targets.shape != hidden.shape[:-1]:
        fail("targets", f"{list(hidden.shape[:-1])} like hidden's rows", list(targets.shape))
    if not is_integer(ignore_index):
        fail("ignore_index", "an integer", repr(ignore_index), TypeError)
    if not -(2**63) <= ignore_index < 2**63:
        fail("ignore_index", "an integer of 64 bits", ignore_index)
    number("z_loss", z_loss, 0)
    number("label_smoothing", label_smoothing, 0, 1)
    if not isinstance(reduction, str) or reduction not in ("none", "sum", "mean"):
        fail("reduction", "'none', 'sum' or 'mean'", repr(reduction))
