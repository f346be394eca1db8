"""What this machine can do at best: the ceilings that figures are compared with.

A ceiling is the fastest of several routines, and of several shapes for matrix products: on a
processor with tile instructions torch's own product of two squares is far from what oneDNN reaches;
a read that asks for memory ahead of its use may be faster than one that leaves that to the
processor, or slower.
A ceiling that something else surpassed isn't one: `surpassed` says so, and no share of it is given.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F

from ..acceleration import routines
from ..weights.prepacked import prepacked_copy
from .timing import copies_of, interleave, synchronize

Probes = dict[str, tuple[Callable[[], object], float]]  # {name: (call, the work it does)}
KEPT = 2  # products that are measured beside a task, of all that were tried before

# (rows, n, k) of x @ weight.T, x [rows, k]: squares, and a model's own shapes.
CPU_SHAPES = ((1024, 1024, 1024), (1536, 1536, 1536), (512, 4096, 1280))
QUICK_SHAPES = ((512, 512, 512), (128, 1024, 512))
GPU_SHAPES = ((8192, 8192, 8192), (8192, 4096, 1280))


def memory_probes(device: torch.device, quick: bool) -> Probes:
    """Reads of much more than a cache holds: by torch, and on a CPU by this package's streams,
    which ask for memory before they need it.
    """
    x = numbers(1 << (30 if device.type == "cuda" else 27 if quick else 28), device)
    (copy,) = copies_of(x.nbytes, device)
    calls = {**reads(x), "copy": copy}
    return {name: (call, float(x.nbytes)) for name, call in calls.items()}


def numbers(nbytes: int, device: torch.device) -> torch.Tensor:
    """float32 to be read, which are numbers as bfloat16 too: 32 KiB over and over."""
    block = torch.randn(1 << 14).to(torch.bfloat16).view(torch.float32)
    return block.to(device).repeat(max(1, nbytes // block.nbytes))


def reads(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Every routine that reads all of x, a multiple of 4096 float32, and nothing more to speak of;
    by its name.
    """
    matrix, vector = x.view(-1, 4096), torch.randn(4096, device=x.device)
    found: dict[str, Callable[[], object]] = {
        "sum": x.sum,
        "mv": lambda: torch.mv(matrix, vector),
    }
    if x.device.type == "cpu" and routines.streams():
        # The same bytes, as a matrix of bfloat16 and of float32: fewer or more instructions a byte.
        narrow, row = x.view(torch.bfloat16).view(-1, 4096), vector.to(torch.bfloat16)[None]
        found["stream bfloat16"] = lambda: routines.stream(row, narrow)
        found["stream float32"] = lambda: routines.stream(vector[None], matrix)
    return found


def product_probes(dtype: torch.dtype, device: torch.device, quick: bool) -> Probes:
    """The fastest products of a dtype here, of all routines and shapes."""
    chosen = _fastest_products(dtype, device, quick)
    shapes = dict.fromkeys(shape for _, shape in chosen)
    products = {shape: _products(shape, dtype, device) for shape in shapes}
    return {
        f"{name} {'x'.join(map(str, shape))}": (products[shape][name], _operations(shape))
        for name, shape in chosen
    }


def matmul_ceiling(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Floating-point operations a second of the fastest matrix product."""
    device = torch.device(device)
    probes = product_probes(dtype, device, False)
    calls = {name: call for name, (call, _) in probes.items()}
    times = interleave(calls, device=device, replay=device.type == "cuda")
    return max(work / times[name].median for name, (_, work) in probes.items())


def surpassed(shares: Mapping[str, float], what: str = "ceiling") -> str | None:
    """Why a ceiling isn't usable: {name: the share of it that was reached} has one above 1."""
    if not shares:
        return None
    name = max(shares, key=lambda name: shares[name])
    if shares[name] <= 1:
        return None
    return f"{what} not usable: {name} reached {shares[name]:.2f} times as much"


def _operations(shape: tuple[int, int, int]) -> float:
    rows, n, k = shape
    return 2.0 * rows * n * k


def _products(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Every routine that multiplies here, by name."""
    rows, n, k = shape
    x = torch.randn(rows, k, device=device).to(dtype)
    weight = torch.randn(n, k, device=device).to(dtype)
    turned = weight.t().contiguous()
    found: dict[str, Callable[[], object]] = {
        "matmul": lambda: x @ turned,
        "F.linear": lambda: F.linear(x, weight),
    }
    if device.type == "cpu" and routines.onednn_takes(dtype):
        prepacked = prepacked_copy(weight)
        found["prepacked"] = lambda: routines.onednn(x, prepacked)
    return found


@cache
def _fastest_products(
    dtype: torch.dtype, device: torch.device, quick: bool
) -> list[tuple[str, tuple[int, int, int]]]:
    """The (routine, shape) that do most a second, tried once in a process."""
    shapes = GPU_SHAPES if device.type == "cuda" else QUICK_SHAPES if quick else CPU_SHAPES
    reached = {}
    for shape in shapes:
        for name, call in _products(shape, dtype, device).items():
            reached[name, shape] = _operations(shape) / _best_of(call, device)
    return sorted(reached, key=lambda key: reached[key], reverse=True)[:KEPT]


def _best_of(call: Callable[[], object], device: torch.device, calls: int = 3) -> float:
    """Seconds of the shortest call after a first one, in which libraries choose their kernels."""
    call()
    taken = []
    for _ in range(calls):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)
