"""Which routine multiplies: torch reaches several GEMM libraries on a CPU, and which one is fast
depends on the processor. In float32 `F.linear` runs on MKL, which is slow on processors that are
not Intel's; in bfloat16 a product with one row leaves more of the memory's speed unused in
`F.linear` than in `torch.mv`, and than this package's own `ops.linear`, whose kernel streams the
weight past up to 8 rows. `measure_plan` times the candidates once per dtype and process and takes
another than `F.linear` only if it is clearly faster. All of them accumulate in float32.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..backends import REFERENCE, choose
from ..checks import fail
from ..ops._flops import counts, of_linear
from ..ops.linear import MAX_ROWS
from ..weights.prepacked import prepacked_copy

FEW_ROWS = 16  # up to here a product waits for memory; beyond it, for arithmetic
SEVERAL_ROWS = 64  # of batches that decode: up to here what a library packs at every call shows
MARGIN = 0.85  # another routine than F.linear must take at most this share of its time
# A prepacked copy that nobody asked for takes memory: it must take at most this share of the time
# of the best without one.
COPY_MARGIN = 0.95
LINEAR, MV, ONEDNN, PREPACKED = "F.linear", "torch.mv", "oneDNN", "oneDNN prepacked"
STREAM = "ops.linear"  # this package's kernel, up to MAX_ROWS rows
AS_MANY = "as many_rows"
ALONE = "only"  # accelerate's argument `prepack`

# Whether a GPU multiplies up to 8 rows by a plain weight with this package's kernel instead of
# cuBLAS's (see `small_batch`). Reasoned, not measured: both wait for the weight's bytes, but five
# launches a layer are gone with the norms, SwiGLU and additions that are part of it.
STREAMED = True


@dataclass(frozen=True)
class Plan:
    """Which routine a projection calls on a CPU; on a GPU it is F.linear, or few rows `streamed`.

    Args:
        one_row: without gradients, for 1 row: "F.linear", "torch.mv", "oneDNN", "oneDNN
            prepacked" or "ops.linear".
        few_rows: up to FEW_ROWS (16); "ops.linear", or if several_rows is named, up to 8.
        many_rows: for more; neither "torch.mv" nor "ops.linear".
        training: with gradients.
        streamed: whether a GPU multiplies up to 8 rows by this package's kernel.
        several_rows: then up to SEVERAL_ROWS (64), as batches that decode have; "as many_rows"
            names none.

    Example:
        >>> report = elmkernels.accelerate(model, plan=Plan(one_row="torch.mv"))
        >>> report.gemm.one_row
        'torch.mv'
    """

    one_row: str = LINEAR
    few_rows: str = LINEAR
    many_rows: str = LINEAR
    training: str = LINEAR
    streamed: bool = STREAMED
    several_rows: str = AS_MANY

    @property
    def inference(self) -> set[str]:
        """The routines of products without gradients."""
        counts = (1, MAX_ROWS, FEW_ROWS, SEVERAL_ROWS, SEVERAL_ROWS + 1)
        return {self.of_rows(rows) for rows in counts}

    @property
    def prepacks(self) -> bool:
        """Whether a routine keeps a prepacked copy of the weights."""
        return PREPACKED in self.inference

    def of_rows(self, rows: int) -> str:
        """The routine of a product without gradients.

        Args:
            rows: how many rows it has.

        Returns:
            Its name.
        """
        if rows == 1:
            return self.one_row
        several = self.several_rows != AS_MANY
        if rows <= (MAX_ROWS if several or self.few_rows == STREAM else FEW_ROWS):
            return self.few_rows
        return self.several_rows if several and rows <= SEVERAL_ROWS else self.many_rows


def check_alone(prepack: str, device: torch.device, dtype: torch.dtype, plan: Plan | None) -> None:
    """Raise unless weights of a dtype can be held prepacked alone."""
    if prepack != ALONE:
        fail("prepack", f"True, False, {ALONE!r} or None", repr(prepack))
    if device.type != "cpu":
        fail("prepack", f"None or False on {device.type}, {ALONE!r} is for a CPU", repr(prepack))
    if plan is not None and plan.inference != {PREPACKED}:
        needs = f"None or {PREPACKED!r} for any number of rows, as prepack is {ALONE!r}"
        fail("plan", needs, ", ".join(sorted(plan.inference)))
    if not onednn_takes(dtype):
        raise RuntimeError(f"prepack={ALONE!r} needs oneDNN to multiply {dtype}: it doesn't here")


def alone_plan(plan: Plan) -> Plan:
    """A plan for weights that are held prepacked alone: no other routine has one to read."""
    names = dict.fromkeys(("one_row", "few_rows", "many_rows"), PREPACKED)
    return replace(plan, **names, several_rows=AS_MANY)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN; weight [n, k] in any strides, or a `prepacked_copy`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


if torch.backends.mkldnn.is_available():  # torch has no formula of its own for it
    counts(torch.ops.mkldnn._linear_pointwise, of_linear)


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a dtype here, and right, with torch's present number of threads:
    float16 it doesn't take on every processor, and if OpenMP grants fewer threads than torch asks
    for (OMP_THREAD_LIMIT), it leaves a part of a product unwritten.
    """
    return _onednn_is_right(dtype, torch.get_num_threads())


@cache
def _onednn_is_right(dtype: torch.dtype, threads: int) -> bool:
    """By the products of a projection and its backward, plain and prepacked, once for each number
    of threads. They are large enough to be shared out.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        x, weight, dy = (
            torch.randn(size, generator=generator, device="cpu").to(dtype)
            for size in ((96, 256), (512, 256), (96, 512))
        )
        try:
            return (
                agrees(lambda: onednn(x, weight), x, weight)
                and agrees(lambda: onednn(dy, weight.t()), dy, weight.t())
                and agrees(lambda: onednn(dy.t(), x.t()), dy.t(), x.t())
                and agrees(lambda: onednn(x, prepacked_copy(weight)), x, weight)
                and agrees(lambda: onednn(x[:1], weight), x[:1], weight)
            )
        except RuntimeError:
            return False


# How many freed pieces of memory, of those that an allocator may choose from, are made NaN.
_POISONED = 16


def agrees(candidate: Callable[[], Tensor], x: Tensor, weight: Tensor) -> bool:
    """Whether a routine's x @ weight.T is no further from the product in float64 than twice
    F.linear's, one rounding, and what the order of k float32 sums may do. Where it writes nothing,
    it leaves NaN: memory that was just freed could hold the right product.
    """
    truth = x.double() @ weight.double().t()
    product = F.linear(x, weight)  # kept to the end, as its memory holds what is right
    linear = (product.double() - truth).abs().max()
    sums = x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    allowed = 2 * linear + (torch.finfo(x.dtype).eps + sums) * truth.abs().max()
    for _ in range(2):
        poison = [torch.full_like(product, torch.nan) for _ in range(_POISONED)]
        del poison
        if not bool(((candidate().double() - truth).abs() <= allowed).all()):
            return False
    return True


def streams() -> bool:
    """Whether this package has a kernel for few rows on this CPU."""
    return choose("linear", "cpu", None) != REFERENCE


def stream(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """x @ weight.T by a backend of `ops.linear`, None for the best here."""
    return ops.linear(x, weight, backend=backend)


def mv(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] of one row times weight [n, k]."""
    return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], weight.shape[0])


def _best_seconds(fns: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    for fn in fns.values():
        fn()
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            samples[name].append(time.perf_counter() - start)
    # The best, not the median: whatever else runs now only ever adds time.
    return {name: min(s) for name, s in samples.items()}


def _fastest(seconds: dict[str, float], margin: float = 1.0) -> str:
    """margin: the share of the best other's time that a prepacked copy may take at most."""
    others = {name: s for name, s in seconds.items() if name != PREPACKED}
    best = min(others, key=others.__getitem__)
    if seconds.get(PREPACKED, float("inf")) < margin * others[best]:
        best = PREPACKED
    return best if seconds[best] <= MARGIN * seconds[LINEAR] else LINEAR


def measure_plan(dtype: torch.dtype, prepacked: bool | None = False) -> Plan:
    """The fastest right routine for each class of rows on this CPU, by timing a [4096, 1280]
    weight.

    prepacked: also time weights in oneDNN's own layout; None: for many rows alone, and take them
    only where they are so much faster that a copy pays. Takes about a second, once a process and
    number of threads: what was fastest then is kept. A routine whose product isn't F.linear's isn't
    timed: what does a part of the work looks fast. If oneDNN doesn't take the dtype, everything is
    F.linear.
    """
    return _measured(dtype, prepacked, torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, prepacked: bool | None, threads: int) -> Plan:
    if not onednn_takes(dtype):
        return Plan()
    generator = torch.Generator().manual_seed(0)
    # Six weights in turn, so that few rows read from memory as they do in a model.
    first = torch.randn(4096, 1280, generator=generator).mul_(0.03).to(dtype)
    weights = [first, *(first.roll(rows, 0) for rows in range(1, 6))]
    # Many rows are bound by their products: two weights in turn say as much, in less memory.
    packed = {True: weights, False: [], None: weights[:2]}[prepacked]
    prepacks = [prepacked_copy(w) for w in packed]
    fewer = [] if prepacked is None else prepacks
    tasks = (1, 40, fewer), (8, 30, fewer), (16, 20, fewer), (256, 10, prepacks)
    with torch.inference_mode():
        one, few, several, many = (
            _best_seconds(_candidates(rows, weights, copies, generator), rounds)
            for rows, rounds, copies in tasks
        )
    training = {name: seconds for name, seconds in many.items() if name != PREPACKED}
    margin = COPY_MARGIN if prepacked is None else 1.0
    return Plan(
        _fastest(one, margin),
        _fastest(few, margin),
        _fastest(many, margin),
        _fastest(training),
        several_rows=_fastest(several, margin),
    )


def _candidates(
    rows: int, weights: list[Tensor], prepacks: list[Tensor], generator: torch.Generator
) -> dict[str, Callable[[], object]]:
    """F.linear and the other routines that are right, each with the next weight at each call."""
    x = torch.randn(rows, weights[0].shape[1], generator=generator).to(weights[0].dtype)
    routines = {ONEDNN: (onednn, weights)}
    if rows == 1:
        routines[MV] = mv, weights
    if rows <= MAX_ROWS and streams():
        routines[STREAM] = stream, weights
    if prepacks:
        routines[PREPACKED] = onednn, prepacks
    right = {
        name: (routine, of)
        for name, (routine, of) in routines.items()
        if agrees(lambda routine=routine, of=of: routine(x, of[0]), x, weights[0])
    }

    def in_turn(routine: Callable, of: list[Tensor]) -> Callable[[], object]:
        turn = itertools.cycle(of)
        return lambda: routine(x, next(turn))

    return {
        name: in_turn(routine, of)
        for name, (routine, of) in ({LINEAR: (F.linear, weights)} | right).items()
    }
