"""What linear_cross_entropy asks of its arguments, and how dweight is summed of its chunks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import optional_kernel
from ..checks import fail, floating, integers, is_integer, number, within

# Bytes of the parts that a float32 dweight is summed in, if its own dtype is another: each is freed
# as soon as it is rounded, which the C library does at once only above 32 MB.
PART_BYTES = 34 << 20


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


def check_targets(targets: Tensor, ignore_index: int, v: int) -> Tensor:
    """The targets that aren't ignored, which must all be among v."""
    real = targets[targets != ignore_index]
    within("targets", real, v, f"weight's rows; {ignore_index} is ignored")
    return real


def sum_dtype(hidden: Tensor, weight: Tensor, alone: bool) -> torch.dtype:
    """Of dweight before it is scaled. alone: whether all rows are one chunk: a bfloat16 product
    that nothing is added to is rounded before the scale and after it, whatever it lies in.
    """
    narrow = hidden.dtype == weight.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    return hidden.dtype if alone and narrow else torch.float32


def parts_of(weight: Tensor, wanted: bool, dtype: torch.dtype, zeros: bool = True) -> list[Tensor]:
    """Room for a dweight, if that is wider than weight in parts of its rows."""
    v, d = weight.shape
    step = v if weight.dtype == dtype else max(1, PART_BYTES // (4 * max(1, d)))
    heights = [min(step, v - begin) for begin in range(0, v if wanted else 0, max(1, step))]
    new = weight.new_zeros if zeros else weight.new_empty
    return [new((height, d), dtype=dtype) for height in heights]


def blocks(matrix: Tensor, x: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a matrix with the columns of x that belong to them, in blocks alike."""
    step = shares(len(matrix), shares(len(matrix), most))
    return zip(matrix.split(step), x.split(step, dim=1), strict=True)


def shares(n: int, of: int) -> int:
    """How many shares of at most `of` elements n elements make: 1 of none."""
    return max(1, -(-n // of))


def add_product(total, dx, h, fresh: bool, product, add) -> None:
    """total += dx^T h in float32, or = where it is fresh. product: room for dx^T h, to be added."""
    if total.dtype == torch.bfloat16:  # of the one chunk that there is
        torch.mm(dx.t(), h, out=total)
    elif product is not None:
        add(total, torch.mm(dx.t(), h, out=product[: len(total)]), None, fresh)
    elif h.device.type == "cuda" and h.dtype != torch.float32:
        total += torch.mm(dx.t(), h, out_dtype=torch.float32)
    else:  # float16 too: a sum could leave its range, and a CPU multiplies it slowly
        total.addmm_(dx.t().float(), h.float(), beta=0 if fresh else 1)


def joined(
    parts: list[Tensor], dtype: torch.dtype, backend: str, scale: Tensor | None = None
) -> Tensor | None:
    """The parts of dweight times scale as one tensor; they are used up."""
    if not parts:
        return None
    add = optional_kernel("linear_cross_entropy_add", backend)
    tracing = torch.compiler.is_compiling()  # which decides itself when memory is free
    if tracing or parts[0].dtype == dtype:
        for part in parts:
            if scale is None:
                break
            if add is not None and dtype == torch.bfloat16 and not tracing:
                add(part, part, scale, True)
            else:
                part.mul_(scale)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
    joined = parts[0].new_empty((sum(map(len, parts)), parts[0].shape[1]), dtype=dtype)
    begin = 0
    while parts:
        part = parts.pop(0)
        to = joined[begin : begin + len(part)]
        if add is not None:
            add(to, part, scale, True)
        else:
            to.copy_(part if scale is None else part.mul_(scale))
        begin += len(part)
    return joined
