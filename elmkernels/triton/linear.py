"""linear: y = x' w^T for up to 8 rows of x and a weight in any form, bound by the weight's bytes.

    x' = x, or with a norm round(round(x rstd) norm), rstd = (mean(x^2) + eps)^-1/2
    y  = round(x' w^T), or round(round(silu(gate)) up) of [gate | up] = round(x' w^T),
         or round(residual + round(x' w^T))

fp32 inside; round() is to x's dtype, at the very places of rms_norm, linear, swiglu and an addition
one after the other. A quantized weight is scale q + bias in fp32 and is not rounded; escapes of a
packed one are added after the rest of their row.

A program takes a few rows of the weight (for swiglu half of them gate's and half up's) and all of
k, so that every sum has one order, the same for any number of rows of x, without atomics or a
second pass. It loads the next tile before it uses the one it has, and the first one before the norm
of x, which every program computes for itself: a few thousand elements from L2, where a kernel of
its own would cost a launch and a round trip through memory.

The products are FMAs of a thread's own columns, not tl.dot: 8 rows of bfloat16 at the bandwidth of
an H100 are 7 weights a cycle and multiprocessor, so 58 of 128 FMAs; nothing passes through shared
memory, and no matrix unit waits for 16 rows. Only 4-bit weights with 8 rows are bound by their
products instead of bytes (29 weights a cycle). Rows are compiled for 1, 2, 4 and 8.

Bytes: the weight's, as stored, once; x once a program from L2. The floor is the weight's bytes over
the memory's bandwidth. No configuration has been measured on a GPU yet; the table says so.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear_weights import Block, escapes_of, load_tile, stored, unpack
from .common import AMD, NVIDIA, arch, guard, pick, vec_of

__all__ = ["linear_dense", "linear_fused", "linear_fwd"]

_NARROW = "reasoned: 2 rows a program spread 1280 to 4096 rows evenly over 108 to 148 processors"
_SHARED = "reasoned: 4 rows a program, so that each load of x serves 4 of the weight"
_SPILLS = "compiled: with 4 rows of the weight and 4 of x sm_100 spills a register"
_WIDE = "reasoned: programs enough for any GPU, so more rows for each load of x"
_WAVES = "reasoned: the same number of threads in waves of 64"

# Of a Block, `width` is n, `rows` those of x and `tile` those of the weight. `warps` may depend on
# n alone, or the order of sums would depend on the rows.
PRODUCT = (
    Block(NVIDIA, 4096, 2, 2, 4, _NARROW),
    Block(("sm_100",), 16384, 4, 2, 4, _SPILLS),
    Block(NVIDIA, 16384, None, 4, 4, _SHARED),
    Block(NVIDIA, None, 1, 8, 4, _WIDE),
    Block(NVIDIA, None, None, 4, 4, _SHARED),
    Block(AMD, 4096, 2, 2, 2, _NARROW + "; " + _WAVES),
    Block(AMD, 16384, None, 4, 2, _SHARED + "; " + _WAVES),
    Block(AMD, None, 1, 8, 2, _WIDE + "; " + _WAVES),
    Block(AMD, None, None, 4, 2, _SHARED + "; " + _WAVES),
)
_COPY = "reasoned: 8 rows, which share the launch of their escapes, 64 bytes or more a thread"
DENSE = (Block(NVIDIA, None, None, 8, 4, _COPY), Block(AMD, None, None, 8, 2, _COPY))


@lru_cache(maxsize=4096)
def plan(table: tuple[Block, ...], form: int, size: int, n: int, rows: int, arch: str):
    """The compile-time constants of a launch on elements of `size` bytes, and its Block."""
    block = pick(table, arch, n, rows)
    constants = {
        "FORM": form,
        "BLOCK_N": block.tile,
        "UNITS": block.warps * (64 if arch in AMD else 32),
        "COLS": 8 if form else 16 // size,
    }
    return constants, block


@triton.jit
def _stack(t, ROWS: tl.constexpr):
    """ROWS tensors [a, b] as one [a, b, ROWS]: the first dimension that join makes is outermost."""
    if ROWS == 1:
        return t[0][:, :, None]
    elif ROWS == 2:
        return tl.join(t[0], t[1])
    elif ROWS == 4:
        both = tl.join(tl.join(t[0], t[2]), tl.join(t[1], t[3]))
        return tl.reshape(both, [both.shape[0], both.shape[1], 4])
    else:
        even = tl.join(tl.join(t[0], t[4]), tl.join(t[2], t[6]))
        both = tl.join(even, tl.join(tl.join(t[1], t[5]), tl.join(t[3], t[7])))
        return tl.reshape(both, [both.shape[0], both.shape[1], 8])


@triton.jit
def _end(k, rows, r):
    """Where row r of x ends: at 0 where there is no such row."""
    return tl.where(rows > r, k, 0)


@triton.jit
def _normed(value, rstd, scale, dtype: tl.constexpr):
    return ((value.to(tl.float32) * rstd).to(dtype).to(tl.float32) * scale).to(dtype)


@triton.jit
def _row(x, cols, there, rstd, norm, scale):
    """Some columns of a row of x, normalized where there is a norm."""
    value = tl.load(x + cols, mask=there, other=0.0)
    if norm is not None:
        value = _normed(value, rstd, scale, x.dtype.element_ty)
    return value


@triton.jit
def _rstds(x, x0, rows, k, eps, ROWS: tl.constexpr, UNITS: tl.constexpr, COLS: tl.constexpr):
    """(mean(x^2) + eps)^-1/2 of each row, [1, 1]."""
    squares = ()
    for _ in tl.static_range(ROWS):
        squares = squares + (tl.zeros([1, UNITS], tl.float32),)
    for first in range(0, k, UNITS * COLS):
        cols = (first + tl.arange(0, UNITS * COLS))[None, :]
        sums = ()
        for r in tl.static_range(ROWS):
            value = tl.load(x + r * x0 + cols, mask=cols < _end(k, rows, r), other=0.0)
            value = tl.reshape(value, [1, UNITS, COLS]).to(tl.float32)
            sums = sums + (squares[r] + tl.sum(value * value, 2),)
        squares = sums
    rstds = ()
    for r in tl.static_range(ROWS):
        rstds = rstds + (tl.rsqrt(tl.sum(squares[r], 1) / k + eps)[:, None],)
    return rstds


@triton.jit
def _escapes(
    x, x0, rstds, norm, starts, columns, values, row, live, rows, k,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """What the sums begin with, ROWS times [BLOCK_N, UNITS]: products of the rows' escapes."""
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros([BLOCK_N, UNITS], tl.float32),)
    if starts is not None:
        begin = tl.load(starts + row, mask=live, other=0)
        end = tl.load(starts + row + 1, mask=live, other=0)
        for first in range(0, tl.max(end - begin, 0), UNITS):
            cols, value, there = escapes_of(begin + first, end, columns, values, UNITS)
            scale = 1.0
            if norm is not None:
                scale = tl.load(norm + cols, mask=there, other=0.0).to(tl.float32)
            sums = ()
            for r in tl.static_range(ROWS):
                rstd = 1.0
                if norm is not None:
                    rstd = rstds[r]
                here = there & (cols < _end(k, rows, r))
                v = _row(x + r * x0, cols, here, rstd, norm, scale)
                sums = sums + (acc[r] + value.to(tl.float32) * v.to(tl.float32),)
            acc = sums
    return acc


@triton.jit(do_not_specialize=["rows", "n", "k", "x0", "w0", "r0"])
def _product(
    x, data, scales, biases, exponents, starts, columns, values, norm, residual, y,
    rows, n, k, x0, w0, r0, eps,
    VEC: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    k = k * VEC
    x0 = x0.to(tl.int64) * VEC
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = i < n
    row = i
    if SWIGLU:  # gate's rows and up's by turns
        row = i // 2 + i % 2 * (n // 2)
    stride = w0.to(tl.int64) * (VEC if FORM == 0 else 1)
    tile = load_tile(data, scales, biases, row, live, stride, 0, k, FORM, GROUP, UNITS, COLS)
    rstds = ()
    if norm is not None:
        rstds = _rstds(x, x0, rows, k, eps, ROWS, UNITS, COLS)
    acc = _escapes(
        x, x0, rstds, norm, starts, columns, values, row, live, rows, k, ROWS, BLOCK_N, UNITS
    )
    for first in range(0, tl.cdiv(k, COLS), UNITS):
        later = load_tile(
            data, scales, biases, row, live, stride, first + UNITS, k, FORM, GROUP, UNITS, COLS
        )
        w = unpack(tile, exponents, first, k, FORM, False, BLOCK_N, UNITS, COLS)
        cols = (first * COLS + tl.arange(0, UNITS * COLS))[None, :]
        scale = 1.0
        if norm is not None:
            scale = tl.load(norm + cols, mask=cols < k, other=0.0).to(tl.float32)
        sums = ()
        for r in tl.static_range(ROWS):
            rstd = 1.0
            if norm is not None:
                rstd = rstds[r]
            v = _row(x + r * x0, cols, cols < _end(k, rows, r), rstd, norm, scale)
            v = tl.reshape(v, [1, UNITS, COLS]).to(tl.float32)
            sums = sums + (acc[r] + tl.sum(w * v, 2),)
        acc = sums
        tile = later
    out = tl.sum(_stack(acc, ROWS), 1).to(dtype)
    r = tl.arange(0, ROWS).to(tl.int64)[None, :]
    if SWIGLU:
        n = n // 2
        pairs = tl.permute(tl.reshape(out, [BLOCK_N // 2, 2, ROWS]), (0, 2, 1))
        gate, up = tl.split(pairs.to(tl.float32))
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        out = (silu * up).to(dtype)
        i = tl.program_id(0).to(tl.int64) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    there = (i < n)[:, None] & (r < rows)
    if residual is not None:
        added = tl.load(residual + r * r0 + i[:, None], mask=there, other=0.0)
        out = (added.to(tl.float32) + out.to(tl.float32)).to(dtype)
    tl.store(y + r * n + i[:, None], out, mask=there)


def _rows(x: Tensor) -> Tensor:
    """x [..., k] as [rows, k]: a view, unless its leading dimensions can't be one."""
    return x.reshape(-1, x.shape[-1])


def _launch(
    x: Tensor, parts: tuple, norm: Tensor | None, eps: float, swiglu: bool, residual: Tensor | None
) -> Tensor:
    data = parts[0]
    n, k = data.shape[0], x.shape[-1]
    y = torch.empty((*x.shape[:-1], n // 2 if swiglu else n), dtype=x.dtype, device=x.device)
    flat = _rows(x)
    added = None if residual is None else _rows(residual)
    plain = parts[-1] == 0
    vec = vec_of(k, flat, *((data,) if plain else ()))
    weight = stored(parts, k, vec)
    rows = flat.shape[0]
    form, size = weight.form, x.element_size()
    constants, block = plan(PRODUCT, form, size, n, rows, arch(x.device))
    with guard(x):
        _product[(triton.cdiv(n, block.tile),)](
            flat, *weight.tensors, None if norm is None else norm.contiguous(), added, y,
            rows, n, k // vec, flat.stride(0) // vec, weight.stride,
            0 if added is None else added.stride(0), eps,
            VEC=vec, GROUP=weight.group, SWIGLU=swiglu,
            ROWS=triton.next_power_of_2(rows), **constants, num_warps=block.warps,
        )  # fmt: skip
    return y


def linear_fwd(x: Tensor, *parts) -> Tensor:
    return _launch(x, parts, None, 0.0, False, None)


def linear_fused(x: Tensor, *rest) -> Tensor:
    *parts, norm, eps, swiglu, residual = rest
    return _launch(x, tuple(parts), norm, eps, swiglu, residual)


@triton.jit(do_not_specialize=["begin", "rows", "k", "w0"])
def _dense(
    data, scales, biases, exponents, starts, columns, values, out, begin, rows, k, w0,
    VEC: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    k = k * VEC
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, live = i + begin, i < rows
    out += (i * k)[:, None]
    for first in range(0, tl.cdiv(k, COLS), UNITS):
        tile = load_tile(data, scales, biases, row, live, w0, first, k, FORM, GROUP, UNITS, COLS)
        w = unpack(tile, exponents, first, k, FORM, True, BLOCK_N, UNITS, COLS)
        if starts is not None:  # its own bits: a conversion may make another NaN of a NaN
            bits = w.to(tl.int32, bitcast=True) >> 16
            w = bits.to(tl.int16).to(out.dtype.element_ty, bitcast=True)
        w = tl.reshape(w.to(out.dtype.element_ty), [BLOCK_N, UNITS * COLS])
        cols = (first * COLS + tl.arange(0, UNITS * COLS))[None, :]
        tl.store(out + cols, w, mask=live[:, None] & (cols < k))
    if starts is not None:
        tl.debug_barrier()  # an escape's place was another thread's
        begins = tl.load(starts + row, mask=live, other=0)
        ends = tl.load(starts + row + 1, mask=live, other=0)
        for first in range(0, tl.max(ends - begins, 0), UNITS):
            cols, value, there = escapes_of(begins + first, ends, columns, values, UNITS)
            tl.store(out + cols, value, mask=there)


def linear_dense(like: Tensor, *rest) -> Tensor:
    *parts, k, begin, end = rest
    rows = end - begin
    out = torch.empty((rows, k), dtype=like.dtype, device=like.device)
    if out.numel() == 0:
        return out
    vec = vec_of(k, out)
    weight = stored(tuple(parts), k, vec)
    constants, block = plan(DENSE, weight.form, out.element_size(), rows, 1, arch(out.device))
    with guard(out):
        # A product and an addition, each rounded, as the reference makes a weight dense.
        _dense[(triton.cdiv(rows, block.tile),)](
            *weight.tensors, out, begin, rows, k // vec, weight.stride, VEC=vec,
            GROUP=weight.group, **constants, num_warps=block.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
