"""linear_cross_entropy's products, chunk by chunk of rows, as one op that no compiler sees into.

The logits of a chunk, in hidden's dtype, become their own gradient dx in place (by a backend's
`linear_cross_entropy_rows`), and dx becomes its share of dhidden = dx weight and of dweight =
dx^T hidden, which is summed in float32. The products are torch's own; on a CPU one in bfloat16 is
added, and at last the sum rounded to weight's dtype, by a backend's `linear_cross_entropy_add`.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import kernel, optional_kernel
from . import _flops
from ._linear_cross_entropy import add_product, blocks, check_targets, parts_of, shares, sum_dtype

# Bytes of a chunk of logits, reasoned. On a CPU adding a chunk's share into dweight is part of the
# product in float32; in bfloat16 it is a pass of its own, the dearer the fewer rows a chunk has.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
ALIKE = 64  # rows of a chunk are few or multiples of it: whole tiles of a matrix product
# Bytes of weight in one product, reasoned: a block that lies in a cache is read again there, and a
# block of dweight is added while it is there.
BLOCK_BYTES = {"cpu": 10 << 20, "cuda": 128 << 20}
COMPACTS = 0.9  # on a CPU ignored tokens are left out where no more than this share is left

# All chunks of a call are one op, so that a compiler sees no loop over them.
_NAME = "elmkernels::linear_cross_entropy"
torch.library.define(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? dloss, int ignore_index, float z_loss, "
    "float label_smoothing, bool dhidden, bool dweight, bool narrow, str backend) "
    "-> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rows_of_chunk(hidden: Tensor, weight: Tensor) -> int:
    """How many rows go through at once."""
    most = max(1, CHUNK_BYTES[hidden.device.type] // (len(weight) * hidden.element_size()))
    return shares(len(hidden), shares(len(hidden), most - most % ALIKE or most))


@torch.library.register_fake(_NAME)
def _fake(hidden, weight, targets, dloss, ignore, z_loss, smoothing, dhidden, dweight, narrow, _):
    losses = hidden.new_empty(targets.shape, dtype=torch.float32)
    alone = narrow and len(hidden) <= _rows_of_chunk(hidden, weight)
    dw = parts_of(weight, dweight, sum_dtype(hidden, weight, alone))
    return losses, hidden.new_empty(hidden.shape if dhidden else (0,)), dw


def _all(hidden, weight, targets, dloss, ignore_index, *rest):
    """The op: losses float32 [n], dhidden, and dweight in parts; empty if not wanted."""
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


def _chunks(
    hidden, weight, targets, dloss, ignore, z_loss, smoothing, dhidden, dweight, narrow, backend
):
    (n, d), v, device = hidden.shape, weight.shape[0], hidden.device.type
    losses = hidden.new_empty(n, dtype=torch.float32)
    rows = kernel("linear_cross_entropy_rows", backend)
    add = optional_kernel("linear_cross_entropy_add", backend)
    dh = hidden.new_empty((n, d) if dhidden else 0)
    writes = device == "cpu" and n > 0  # the first chunk writes dweight, the others add to it
    step = _rows_of_chunk(hidden, weight)
    sums = sum_dtype(hidden, weight, narrow and n <= step)
    dw = parts_of(weight, dweight, sums, zeros=not writes)
    weight = weight.to(hidden.dtype)
    block = max(1, BLOCK_BYTES[device] // max(1, d * hidden.element_size()))
    room = hidden.new_empty((step, v))  # one for all chunks: the C library maps it but once
    product = None
    if dweight and add is not None and hidden.dtype == torch.bfloat16 and sums == torch.float32:
        product = hidden.new_empty((min(block, v), d))
    with torch.autocast(device, enabled=False):
        for begin in range(0, n, step):
            chunk = slice(begin, min(n, begin + step))
            h = hidden[chunk]
            x = room[: len(h)]
            for w, columns in blocks(weight, x, block):
                torch.mm(h, w.t(), out=columns)
            arriving = None if dloss is None else dloss[chunk]
            grad = dhidden or dweight
            losses[chunk] = rows(x, targets[chunk], arriving, ignore, z_loss, smoothing, grad)
            if dhidden:
                torch.mm(x, weight, out=dh[chunk])
            fresh = writes and begin == 0
            for part, columns in zip(dw, x.split([len(p) for p in dw] or v, dim=1), strict=False):
                for total, dx in blocks(part, columns, block):
                    add_product(total, dx, h, fresh, product, add)
    return losses, dh, dw


_flops.counts(torch.ops.elmkernels.linear_cross_entropy, _flops.losses)
op = torch.ops.elmkernels.linear_cross_entropy.default


def run(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The op, of its arguments but `narrow`: a trace doesn't follow how many rows there are."""
    return op(*arguments[:-1], not torch.compiler.is_compiling(), arguments[-1])
