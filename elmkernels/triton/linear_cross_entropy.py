"""linear_cross_entropy: rows of logits become losses and, in place, their own gradient.

    loss = lse - (1 - e) x[target] - e mean(x) + z lse^2,   lse = max + log(sum exp(x - max)),
    dx_j = dloss ((1 + 2 z lse) exp(x_j - max) / sum - (1 - e) [j = target] - e / n).

fp32 inside; one program a row, which runs through the vocabulary in blocks. Every lane keeps a
maximum and a sum of its own, so that no block waits for a reduction: two exponentials an element,
behind loads that take longer. Differences from the maximum alone are used, so nothing is lost where
all the logits share an offset. The second pass finds the row in L2.

Bytes a row of n in a type of b bytes: nb read, with the gradient nb written too. The floor is those
bytes over the memory's bandwidth. No configuration has been measured on a GPU yet.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AMD, NVIDIA, Tile, arch, guard, pick

_SHORT = "reasoned: a small vocabulary leaves few lanes idle in its last block"
_LONG = "reasoned: 16 elements a thread, two 16-byte loads in flight, and three sums in registers"

# Of a Tile, `width` is the vocabulary and `tile` the elements of a block.
ROWS = (
    Tile(NVIDIA, 4096, None, 1024, 4, _SHORT),
    Tile(NVIDIA, None, None, 4096, 8, _LONG),
    Tile(AMD, 4096, None, 1024, 2, _SHORT),
    Tile(AMD, None, None, 4096, 4, _LONG),
)


@lru_cache(maxsize=4096)
def plan(n: int, rows: int, arch: str) -> tuple[dict, Tile]:
    """The compile-time constants of a launch on rows of n, and the row of the table they are of."""
    tile = pick(ROWS, arch, n, rows)
    return {"BLOCK": tile.tile}, tile


@triton.jit
def _softmax(x, n, BLOCK: tl.constexpr, SMOOTH: tl.constexpr):
    """max, sum exp(x - max) and, if SMOOTH, sum (x - max)."""
    lane = tl.arange(0, BLOCK)
    # The lowest finite number: -inf from it is no NaN.
    top = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    offsets = tl.zeros([BLOCK], tl.float32)
    seen = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        live = first + lane < n
        value = tl.load(x + first + lane, mask=live, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(top, value)
        total = total * tl.exp(top - larger) + tl.exp(value - larger)
        if SMOOTH:
            offsets += tl.where(live, value - larger, 0.0) - seen * (larger - top)
            seen += tl.where(live, 1.0, 0.0)
        top = larger
    most = tl.max(top, 0)
    total *= tl.exp(top - most)
    if SMOOTH:
        offsets += seen * (top - most)
    return most, tl.sum(total, 0), tl.sum(offsets, 0)


@triton.jit(do_not_specialize=["n", "s0", "ignore_index"])
def _rows(
    logits, targets, dloss, losses, n, s0, ignore_index, z_loss, smoothing,
    VEC: tl.constexpr, BLOCK: tl.constexpr, GRAD: tl.constexpr, GIVEN: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = logits.dtype.element_ty
    n = n * VEC
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * s0 * VEC
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    if (target == ignore_index) | (target < 0) | (target >= n):
        value = tl.where(target == ignore_index, 0.0, float("nan"))
        tl.store(losses + row, value)
        if GRAD:
            for first in range(0, n, BLOCK):
                live = first + lane < n
                filled = tl.zeros([BLOCK], tl.float32) + value
                tl.store(x + first + lane, filled.to(dtype), mask=live)
    else:
        at = tl.load(x + target).to(tl.float32)
        top, total, offsets = _softmax(x, n, BLOCK, SMOOTH)
        log_total = tl.log(total)
        lse = top + log_total
        hit = 1.0 - smoothing
        loss = log_total - hit * (at - top) + z_loss * lse * lse
        if SMOOTH:
            loss -= smoothing * offsets / n
        tl.store(losses + row, loss)
        if GRAD:
            arriving = tl.load(dloss + row) if GIVEN else 1.0
            slope = arriving * (1.0 + 2.0 * z_loss * lse) / total
            for first in range(0, n, BLOCK):
                cols = first + lane
                value = tl.load(x + cols, mask=cols < n, other=float("-inf")).to(tl.float32)
                dx = slope * tl.exp(value - top) - arriving * smoothing / n
                dx -= tl.where(cols == target, arriving * hit, 0.0)
                tl.store(x + cols, dx.to(dtype), mask=cols < n)


def linear_cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor | None,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    grad: bool,
) -> Tensor:
    rows, n = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return losses
    stride = logits.stride(0)
    vec = 16 // logits.element_size()
    if n % vec or stride % vec or logits.data_ptr() % 16:
        vec = 1
    constants, tile = plan(n, rows, arch(logits.device))
    with guard(logits):
        _rows[(rows,)](
            logits, targets, dloss, losses, n // vec, stride // vec, ignore_index, z_loss,
            label_smoothing, VEC=vec, GRAD=grad, GIVEN=dloss is not None,
            SMOOTH=label_smoothing > 0, **constants, num_warps=tile.warps,
        )  # fmt: skip
    return losses
