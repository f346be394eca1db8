"""What the Triton kernels share: rows of strided tensors, the choice of a tile, partial sums.

Sizes and strides are run-time integers that Triton never specializes on. They travel in units of
VEC elements (16 bytes where every one of them divides, else 1 element) and a kernel multiplies
them back, so that the compiler knows that a row starts on a 16-byte boundary, and loads vectors,
without knowing any width: one compilation serves every layer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 3


@dataclass(frozen=True, eq=False)  # hashed by identity: launches look plans up by their table
class Tile:
    """One row of a configuration table: the first whose limits hold is the one that runs.

    `width` and `rows` are the largest problem it is for (None: any); `tile` rows go to one program
    of `warps` warps; a persistent kernel starts `per_sm` programs on each multiprocessor.
    """

    archs: tuple[str, ...]
    width: int | None
    rows: int | None
    tile: int
    warps: int
    measured: str
    per_sm: int = 1


NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)


def pick(table: Sequence[Tile], arch: str, width: int, rows: int) -> Tile:
    """The first row of a table for this architecture and size; tables end with an open row."""
    for row in table:
        if (
            arch in row.archs
            and (row.width is None or width <= row.width)
            and (row.rows is None or rows <= row.rows)
        ):
            return row
    raise ValueError(f"no configuration for {arch}, width {width}, {rows} rows")


@lru_cache
def arch(device: torch.device) -> str:
    """The table key of a device: its own architecture, or the nearest below that has rows."""
    if device.type != "cuda":
        return "sm_90"  # Triton's interpreter: any row computes the same numbers
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def persistent_programs(tile: Tile, rows: int, least: int, device: torch.device) -> int:
    """How many programs share rows: each gets a tile and at least `least` rows, if there are as
    many, so that what a program reads and leaves for itself is little beside its rows."""
    most = min(triton.cdiv(rows, tile.tile), tile.per_sm * multiprocessors(device))
    return max(1, min(most, rows // least))


def guard(x: Tensor) -> AbstractContextManager:
    """Launch on x's own device: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def collapse(sizes: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dimensions that all the tensors step through as one; drop those of 1."""
    kept: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if kept and all(m[-1] == s[i] * size for m, s in zip(merged, strides, strict=True)):
            kept[-1] *= size
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[i]
            continue
        kept.append(size)
        for m, s in zip(merged, strides, strict=True):
            m.append(s[i])
    return kept or [1], [m or [0] for m in merged]


class Rows(NamedTuple):
    """Tensors of one leading shape as rows: how many, and how a kernel finds each one's start.

    `sizes` are the two inner leading sizes; `strides` three per tensor, in units of `vec` elements.
    """

    tensors: tuple[Tensor, ...]
    count: int
    rank: int
    vec: int
    sizes: tuple[int, int]
    strides: Sequence[tuple[int, int, int]]


def rows_of(*tensors: Tensor, multiple: int) -> Rows:
    """Tensors [..., width] of one dtype as rows. `multiple` divides every one of their widths.

    No copy, unless more than three leading dimensions are left after merging: then those tensors
    that are not contiguous are copied.
    """
    first = tensors[0]
    shape = first.shape[:-1]
    count = shape.numel()
    vec = 16 // first.element_size()
    if multiple % vec:
        vec = 1
    if not all(t.is_contiguous() for t in tensors):
        sizes, strides = collapse(shape, *(t.stride()[:-1] for t in tensors))
        if len(sizes) <= MAX_RANK:
            if any(s % vec for each in strides for s in each):
                vec = 1
            rank = len(sizes)
            inner = (sizes[1] if rank > 1 else 1, sizes[2] if rank > 2 else 1)
            padded = [tuple(s // vec for s in (*each, 0, 0)[:3]) for each in strides]
            return Rows(tensors, count, rank, vec, inner, padded)
        tensors = tuple(t.contiguous() for t in tensors)
    return Rows(tensors, count, 1, vec, (1, 1), [(t.shape[-1] // vec, 0, 0) for t in tensors])


def vec_of(width: int, *tensors: Tensor) -> int:
    """Elements in 16 bytes where `width` and every stride but the last divide by them, else 1."""
    vec = 16 // tensors[0].element_size()
    if width % vec or any(s % vec for t in tensors for s in t.stride()[:-1]):
        return 1
    return vec


def units(t: Tensor, vec: int) -> tuple[int, ...]:
    """All strides but the last, in units of `vec` elements."""
    return tuple(s // vec for s in t.stride()[:-1])


@triton.jit
def row_offset(row, d1, d2, s0, s1, s2, VEC: tl.constexpr, RANK: tl.constexpr):
    """Where int64 rows start in a tensor of RANK leading dimensions [any, d1, d2]."""
    if RANK == 1:
        offset = row * s0
    elif RANK == 2:
        offset = (row // d1) * s0 + (row % d1) * s1
    else:
        outer = row // d2
        offset = (outer // d1) * s0 + (outer % d1) * s1 + (row % d2) * s2
    return offset * VEC


@triton.jit(do_not_specialize=["programs", "n"])
def _sum_partials(partial, out, programs, n, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        live = (p < programs) & (cols < n)[None, :]
        total += tl.load(partial + p * n + cols[None, :], mask=live, other=0.0)
    tl.store(out + cols, tl.sum(total, 0), mask=cols < n)


def partials_of(programs: int, weight: Tensor, added: bool = False) -> Tensor:
    """[programs, n] for what each adds to a weight's gradient: of a single program it is the
    gradient. `added`: what a program does not only store there, but adds to."""
    if programs == 1 and not added:
        return torch.empty(1, *weight.shape, dtype=weight.dtype, device=weight.device)
    make = torch.zeros if added else torch.empty
    return make(programs, *weight.shape, dtype=torch.float32, device=weight.device)


SUM_BLOCKS = {"BLOCK_P": 64, "BLOCK_N": 32}


def sum_partials(partial: Tensor, like: Tensor) -> Tensor:
    """[programs, n] summed over the programs, in a fixed order, in the dtype of `like`."""
    programs, n = partial.shape
    if programs == 1 and partial.dtype == like.dtype:
        return partial[0]
    out = torch.empty(n, dtype=like.dtype, device=like.device)
    grid = (triton.cdiv(n, SUM_BLOCKS["BLOCK_N"]),)
    _sum_partials[grid](partial, out, programs, n, **SUM_BLOCKS, num_warps=4)
    return out
