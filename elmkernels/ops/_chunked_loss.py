"""linear_cross_entropy's products, chunk by chunk of rows, as one op that no compiler sees into.

The logits of a chunk, in hidden's dtype, become their own gradient dx in place (by a backend's
`linear_cross_entropy_rows`), and dx becomes its share of dhidden = dx weight and of dweight =
dx^T hidden, which is summed in float32. The products are torch's own; on a CPU one in bfloat16 is
added, and at last the sum rounded to weight's dtype, by a backend's `linear_cross_entropy_add`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import kernel, optional_kernel
from ..checks import within
from . import _flops

# Bytes of a chunk of logits, reasoned. On a CPU adding a chunk's share into dweight is part of the
# product in float32; in bfloat16 it is a pass of its own, the dearer the fewer rows a chunk has.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
ALIKE = 64  # rows of a chunk are few or multiples of it: whole tiles of a matrix product
# Bytes of weight in one product, reasoned: a block that lies in a cache is read again there, and a
# block of dweight is added while it is there.
BLOCK_BYTES = {"cpu": 10 << 20, "cuda": 128 << 20}
# Bytes of the parts that a float32 dweight is summed in, if its own dtype is another: each is freed
# as soon as it is rounded, which the C library does at once only above 32 MB.
PART_BYTES = 34 << 20
COMPACTS = 0.9  # on a CPU ignored tokens are left out where no more than this share is left

# All chunks of a call are one op, so that a compiler sees no loop over them.
_NAME = "elmkernels::linear_cross_entropy"
torch.library.define(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? dloss, int ignore_index, float z_loss, "
    "float label_smoothing, bool dhidden, bool dweight, str backend) -> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_targets(targets: Tensor, ignore_index: int, v: int) -> Tensor:
    """The targets that aren't ignored, which must all be among v."""
    real = targets[targets != ignore_index]
    within("targets", real, v, f"weight's rows; {ignore_index} is ignored")
    return real


@torch.library.register_fake(_NAME)
def _fake(hidden, weight, targets, dloss, ignore_index, z_loss, smoothing, dhidden, dweight, _):
    losses = hidden.new_empty(targets.shape, dtype=torch.float32)
    return losses, hidden.new_empty(hidden.shape if dhidden else (0,)), _parts(weight, dweight)


def _parts(weight: Tensor, wanted: bool, zeros: bool = True) -> list[Tensor]:
    """Room for a float32 dweight, in parts of its rows."""
    v, d = weight.shape
    step = v if weight.dtype == torch.float32 else max(1, PART_BYTES // (4 * max(1, d)))
    heights = [min(step, v - begin) for begin in range(0, v if wanted else 0, step)]
    new = weight.new_zeros if zeros else weight.new_empty
    return [new((height, d), dtype=torch.float32) for height in heights]


def _all(hidden, weight, targets, dloss, ignore_index, *rest):
    """The op: losses float32 [n], dhidden, and dweight in float32 parts; empty if not wanted."""
    if hidden.device.type != "cpu":
        return _chunks(hidden, weight, targets, dloss, ignore_index, *rest)
    kept = check_targets(targets, ignore_index, weight.shape[0])
    if len(kept) >= COMPACTS * len(targets):
        return _chunks(hidden, weight, targets, dloss, ignore_index, *rest)
    real = targets != ignore_index
    dloss = None if dloss is None else dloss[real]
    found, dh, dw = _chunks(hidden[real], weight, kept, dloss, ignore_index, *rest)
    losses = found.new_zeros(len(targets))
    losses[real] = found
    if dh.dim() == 2:
        dh = hidden.new_zeros(hidden.shape).masked_scatter_(real[:, None], dh)
    return losses, dh, dw


torch.library.impl(_NAME, ("cpu", "cuda"), _all)


def _chunks(hidden, weight, targets, dloss, ignore, z_loss, smoothing, dhidden, dweight, backend):
    (n, d), v, device = hidden.shape, weight.shape[0], hidden.device.type
    losses = hidden.new_empty(n, dtype=torch.float32)
    rows = kernel("linear_cross_entropy_rows", backend)
    add = optional_kernel("linear_cross_entropy_add", backend)
    dh = hidden.new_empty((n, d) if dhidden else 0)
    writes = device == "cpu" and n > 0  # the first chunk writes dweight, the others add to it
    dw = _parts(weight, dweight, zeros=not writes)
    narrow = weight.to(hidden.dtype)
    most = max(1, CHUNK_BYTES[device] // (v * hidden.element_size()))
    step = _shares(n, _shares(n, most - most % ALIKE or most))
    block = max(1, BLOCK_BYTES[device] // max(1, d * hidden.element_size()))
    room = hidden.new_empty((step, v))  # one for all chunks: the C library maps it but once
    product = None
    if dweight and add is not None and hidden.dtype == torch.bfloat16:
        product = hidden.new_empty((min(block, v), d))
    with torch.autocast(device, enabled=False):
        for begin in range(0, n, step):
            chunk = slice(begin, min(n, begin + step))
            h = hidden[chunk]
            x = room[: len(h)]
            for w, columns in _blocks(narrow, x, block):
                torch.mm(h, w.t(), out=columns)
            arriving = None if dloss is None else dloss[chunk]
            grad = dhidden or dweight
            losses[chunk] = rows(x, targets[chunk], arriving, ignore, z_loss, smoothing, grad)
            if dhidden:
                torch.mm(x, narrow, out=dh[chunk])
            fresh = writes and begin == 0
            for part, columns in zip(dw, x.split([len(p) for p in dw] or v, dim=1), strict=False):
                for total, dx in _blocks(part, columns, block):
                    _add_product(total, dx, h, fresh, product, add)
    return losses, dh, dw


def _blocks(matrix: Tensor, x: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a matrix with the columns of x that belong to them, in blocks alike."""
    step = _shares(len(matrix), _shares(len(matrix), most))
    return zip(matrix.split(step), x.split(step, dim=1), strict=True)


def _shares(n: int, of: int) -> int:
    """How many shares of at most `of` elements n elements make: 1 of none."""
    return max(1, -(-n // of))


def _add_product(total, dx, h, fresh: bool, product, add) -> None:
    """total += dx^T h in float32, or = where it is fresh. product: room for dx^T h, to be added."""
    if product is not None:
        add(total, torch.mm(dx.t(), h, out=product[: len(total)]), None, fresh)
    elif h.device.type == "cuda" and h.dtype != torch.float32:
        total += torch.mm(dx.t(), h, out_dtype=torch.float32)
    else:  # float16 too: a sum could leave its range, and a CPU multiplies it slowly
        total.addmm_(dx.t().float(), h.float(), beta=0 if fresh else 1)


_flops.counts(torch.ops.elmkernels.linear_cross_entropy, _flops.losses)
run = torch.ops.elmkernels.linear_cross_entropy.default


def joined(
    parts: list[Tensor], dtype: torch.dtype, backend: str, scale: Tensor | None = None
) -> Tensor | None:
    """The parts of dweight times scale as one tensor; they are used up."""
    if not parts:
        return None
    add = optional_kernel("linear_cross_entropy_add", backend)
    tracing = torch.compiler.is_compiling()  # which decides itself when memory is free
    if tracing or parts[0].dtype == dtype:
        if scale is not None:
            for part in parts:
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
