"""swiglu: y = round(silu(gate)) * up for gate_up = [gate | up] along the last dimension.

fp32 inside; silu is rounded to the input's dtype before the product. Every OpenELM feed-forward
width is a multiple of 256, so programs take tiles of rows by 256 columns and no lane idles; the
width is a run-time integer, so one compilation serves all the layers of all the models.

Backward, with s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * silu(gate),
written as one [dgate | dup].

Bytes a row of n in a type of b bytes, each from memory once: forward 3nb, backward 5nb. The floor
is those bytes over the memory's bandwidth. No configuration has been measured on a GPU yet.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import AMD, NVIDIA, Tile, arch, guard, pick, row_offset, rows_of

COLS = 256

_FEW = "reasoned: one row a program, one 16-byte load of each half a thread, most programs"
_MANY = "reasoned: 2048 elements a program, 16 a thread: two 16-byte loads of each half in flight"

FORWARD = (
    Tile(NVIDIA, None, 64, 1, 1, _FEW),
    Tile(NVIDIA, None, None, 8, 4, _MANY),
    Tile(AMD, None, 64, 2, 1, _FEW),
    Tile(AMD, None, None, 8, 2, _MANY),
)
BACKWARD = (
    Tile(NVIDIA, None, 64, 1, 1, _FEW),
    Tile(NVIDIA, None, None, 4, 4, "reasoned: one 16-byte load of each of three inputs a thread"),
    Tile(AMD, None, 64, 2, 1, _FEW),
    Tile(AMD, None, None, 4, 2, "reasoned: one 16-byte load of each of three inputs a thread"),
)


@lru_cache(maxsize=4096)
def plan(table: tuple[Tile, ...], n: int, rows: int, arch: str) -> tuple[dict, Tile]:
    """The compile-time constants of a launch on rows of n, and the row of the table they are of."""
    tile = pick(table, arch, n, rows)
    return {"ROWS": tile.tile, "COLS": COLS}, tile


@triton.jit
def _tile(rows, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows and columns, and which of them exist: column blocks run fastest."""
    across = tl.cdiv(n, COLS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = ((program % across) * COLS + tl.arange(0, COLS))[None, :]
    return row, cols, (row < rows)[:, None] & (cols < n)


@triton.jit(do_not_specialize=["rows", "n", "d1", "d2", "s0", "s1", "s2"])
def _fwd(
    gate_up, y, rows, n, d1, d2, s0, s1, s2,
    VEC: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = gate_up.dtype.element_ty
    n = n * VEC
    row, cols, live = _tile(rows, n, ROWS, COLS)
    gate_up += row_offset(row, d1, d2, s0, s1, s2, VEC, RANK)[:, None]
    gate = tl.load(gate_up + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + n + cols, mask=live, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y + (row * n)[:, None] + cols, (silu * up).to(dtype), mask=live)


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    n = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], n), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel() == 0:
        return y
    r = rows_of(gate_up, multiple=n)
    constants, tile = plan(FORWARD, n, r.count, arch(gate_up.device))
    programs = triton.cdiv(r.count, tile.tile) * triton.cdiv(n, COLS)
    with guard(gate_up):
        _fwd[(programs,)](
            r.tensors[0], y, r.count, n // r.vec, *r.sizes, *r.strides[0],
            VEC=r.vec, RANK=r.rank, **constants, num_warps=tile.warps,
        )  # fmt: skip
    return y


@triton.jit(
    do_not_specialize=["rows", "n", "d1", "d2", "a0", "a1", "a2", "b0", "b1", "b2"],
)
def _bwd(
    dy, gate_up, dgate_up, rows, n, d1, d2, a0, a1, a2, b0, b1, b2,
    VEC: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = gate_up.dtype.element_ty
    n = n * VEC
    row, cols, live = _tile(rows, n, ROWS, COLS)
    dy += row_offset(row, d1, d2, a0, a1, a2, VEC, RANK)[:, None]
    gate_up += row_offset(row, d1, d2, b0, b1, b2, VEC, RANK)[:, None]
    dy = tl.load(dy + cols, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + n + cols, mask=live, other=0.0).to(tl.float32)
    more = 1.0 + tl.exp(-gate)
    s = 1.0 / more
    silu = (gate / more).to(dtype).to(tl.float32)
    dgate_up += (row * 2 * n)[:, None] + cols
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_up, dgate.to(dtype), mask=live)
    tl.store(dgate_up + n, (dy * silu).to(dtype), mask=live)


def swiglu_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if dgate_up.numel() == 0:
        return dgate_up
    n = dy.shape[-1]
    r = rows_of(dy, gate_up, multiple=n)
    constants, tile = plan(BACKWARD, n, r.count, arch(dy.device))
    programs = triton.cdiv(r.count, tile.tile) * triton.cdiv(n, COLS)
    with guard(dy):
        _bwd[(programs,)](
            *r.tensors, dgate_up, r.count, n // r.vec, *r.sizes, *r.strides[0], *r.strides[1],
            VEC=r.vec, RANK=r.rank, **constants, num_warps=tile.warps,
        )  # fmt: skip
    return dgate_up
