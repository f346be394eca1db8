"""Projections: the matrix products are borrowed from torch, and chosen by measuring them here.

torch reaches several GEMM libraries on a CPU, and which one is fast depends on the processor: in
float32 `F.linear` runs on MKL, which is slow on processors that are not Intel's; in bfloat16 a
product with one row leaves more of the memory's speed unused in `F.linear` than in `torch.mv`.
`measure_plan` times the candidates once per dtype and process and takes another than
`F.linear` only where it is clearly faster. All of them accumulate in float32.

A prepacked copy (oneDNN's own blocked layout) is optional, because it doubles a weight's memory. It
belongs to the weight, not to a caller, and is used for one state of the weight only: its version,
address and dtype are compared at every call (a load, a move, most optimizers), and because fused
optimizers don't count versions, so are the steps of all optimizers. Whoever uses the weight with
gradients drops the copy, the loss as well, and none is made or used while the weight has a
gradient. A write through `weight.data` (merging an adapter) torch doesn't see: some numbers of the
weight are compared for it, which one that changes few of them may miss: `accelerate` again then.
"""

import itertools
import time
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..openelm import layers
from ..openelm.compressed import product
from ..openelm.surgery import known, plain_tensor
from ..weights.formats import Weight
from .classes import Fused, setting, while_fused

FEW_ROWS = 16  # up to here a product waits for memory; beyond it, for arithmetic
MARGIN = 0.85  # another routine than F.linear must take at most this share of its time

# Whether a GPU multiplies up to 8 rows by a plain weight with this package's kernel instead of
# cuBLAS's (see `small_batch`). Reasoned, not measured: both wait for the weight's bytes, but five
# launches a layer are gone with the norms, SwiGLU and additions that are part of it.
STREAMED = True

LINEAR, MV, ONEDNN, PREPACKED = "F.linear", "torch.mv", "oneDNN", "oneDNN prepacked"


@dataclass(frozen=True)
class Plan:
    """Which routine a projection calls on a CPU; on a GPU it is F.linear, or few rows `streamed`.

    Args:
        one_row: without gradients, for 1 row: "F.linear", "torch.mv", "oneDNN" or "oneDNN
            prepacked".
        few_rows: up to FEW_ROWS (16).
        many_rows: for more.
        training: with gradients.
        streamed: whether a GPU multiplies up to 8 rows by this package's kernel.

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

    @property
    def prepacks(self) -> bool:
        """Whether a routine keeps a prepacked copy of the weights."""
        return PREPACKED in (self.one_row, self.few_rows, self.many_rows)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN; weight [n, k] in any strides, or a `prepacked_copy`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


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


def agrees(candidate: Callable[[], Tensor], x: Tensor, weight: Tensor) -> bool:
    """Whether a routine's x @ weight.T is no further from the product in float64 than twice
    F.linear's, one rounding, and what the order of k float32 sums may do. Where it writes nothing,
    it leaves NaN: memory that was just freed could hold the right product.
    """
    truth = x.double() @ weight.double().t()
    linear = (F.linear(x, weight).double() - truth).abs().max()
    sums = x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    allowed = 2 * linear + (torch.finfo(x.dtype).eps + sums) * truth.abs().max()
    for _ in range(2):
        poison = torch.full_like(truth, torch.nan, dtype=x.dtype)
        del poison
        if not bool(((candidate().double() - truth).abs() <= allowed).all()):
            return False
    return True


def prepacked_copy(weight: Tensor) -> Tensor:
    """A copy of weight [n, k] in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def mv(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] of one row times weight [n, k]."""
    return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], weight.shape[0])


class _OneDNNLinear(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, each by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = onednn(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = onednn(dy.flatten(0, -2).t(), x.flatten(0, -2).t())
        return dx, dweight


class _AutocastLinear(torch.autograd.Function):
    """The product under autocast. F.linear keeps the narrow copy of the weight until its backward;
    this makes it again from the weight itself: of OpenELM-270M 440 MB less, for half a pass over
    the weights.
    """

    @staticmethod
    def forward(ctx, x, weight, dtype):
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
        return dx, dweight, None


class Linear(Fused):
    """nn.Linear with the plan's routines; its state are its Products."""

    _fused: "Products"
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def products(self) -> "Products":
        """The routines."""
        return self._fused

    @property
    def plan(self) -> Plan:
        """Which routines they are."""
        return self._fused.plan

    @while_fused
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.bias is not None or not plain_tensor(weight):
            return super().forward(x)
        return self._fused(x, weight)

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._fused.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._fused.plan}"


@dataclass
class HeadState:
    """What a fused tied head needs: its routines, and the backend of `ops.linear` for a compressed
    weight.
    """

    products: "Products"
    backend: str | None


@known
class TiedHead(Fused, layers.TiedHead):
    """The output projection by the embedding's weight, with the plan's routines; a compressed one
    is multiplied by a backend of `ops.linear`.
    """

    _fused: HeadState
    products, backend = setting("products"), setting("backend")

    @while_fused
    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        if not isinstance(weight, Tensor):
            return product(x, weight, self._fused.backend)
        if not plain_tensor(weight):
            return super().forward(x, weight)
        return self._fused.products(x, weight)

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._fused.products.drop()
        return super().train(mode)


class _Copy(NamedTuple):
    state: tuple[Any, ...]
    sample: Tensor  # some of the weight's numbers, for who writes through `weight.data`
    tensor: Tensor


# Prepacked copies, by their weights: whoever uses a weight for training can drop its copy.
_COPIES: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()
_steps = [0]  # of any optimizer in this process


@cache
def _watch_optimizers() -> None:
    """Count the steps of all optimizers: fused ones write weights without counting a version."""

    def count(*_: object) -> None:
        _steps[0] += 1

    register_optimizer_step_post_hook(count)


def forget(weight: Tensor) -> None:
    """Drop the prepacked copy of a weight: it is about to be trained."""
    if _COPIES:
        _COPIES.pop(weight, None)


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """What changes if a weight's numbers do, as far as torch tells."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape, _steps[0]


def _sample(weight: Tensor) -> Tensor:
    """Some 64 numbers from all over a weight [n, k]: 5 us to compare."""
    n, k = weight.shape
    return weight.detach()[:: max(1, n // 8), :: max(1, k // 8)]


class Products:
    """x @ weight.T by a plan, with a prepacked copy of the weight if the plan asks for it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._weight: weakref.ref[Tensor] | None = None  # the last that was prepacked here

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if _autocast_training(x, weight):
            with torch.autocast(x.device.type, enabled=False):
                return _AutocastLinear.apply(x, weight, torch.get_autocast_dtype("cpu"))
        if (
            torch.compiler.is_compiling()  # Inductor makes its own choice
            or x.dtype != weight.dtype  # autocast
            or x.device.type != "cpu"
            or x.numel() == 0
        ):
            return F.linear(x, weight)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            forget(weight)
            named = self.plan.training == ONEDNN and onednn_takes(x.dtype)
            if named and not torch.is_autocast_enabled("cpu"):
                return _OneDNNLinear.apply(x, weight)
            return F.linear(x, weight)
        rows = x.numel() // x.shape[-1]
        plan = self.plan
        routine = (
            plan.one_row if rows == 1 else plan.few_rows if rows <= FEW_ROWS else plan.many_rows
        )
        if routine == LINEAR or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight)
        if routine == MV:
            return mv(x, weight)
        if not onednn_takes(x.dtype):  # the plan is of another dtype
            return F.linear(x, weight)
        if routine == PREPACKED and weight.grad is None:
            return onednn(x, self.prepacked(weight))
        self.drop()
        return onednn(x, weight)

    def prepacked(self, weight: Tensor) -> Tensor:
        """The prepacked copy of this very state of the weight."""
        _watch_optimizers()
        state, found = _state_of(weight), _COPIES.get(weight)
        sample = _sample(weight)
        if found is None or found.state != state or not torch.equal(found.sample, sample):
            found = _COPIES[weight] = _Copy(state, sample.clone(), prepacked_copy(weight))
        self._weight = weakref.ref(weight)
        return found.tensor

    def _last(self) -> Tensor | None:
        return None if self._weight is None else self._weight()

    def drop(self) -> None:
        """Forget the copy that was made here, if there is one."""
        weight, self._weight = self._last(), None
        if weight is not None:
            forget(weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the prepacked copy, as long as there is one."""
        weight = self._last()
        found = None if weight is None else _COPIES.get(weight)
        return 0 if found is None or weight is None else weight.nbytes

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's layout can't be pickled or deep-copied: a copy prepacks again at its first call.
        return {"plan": self.plan, "_weight": None}


def _autocast_training(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch.is_autocast_enabled("cpu")
        and weight.dtype == torch.float32
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.numel() > 0
    )


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


def _fastest(seconds: dict[str, float]) -> str:
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] <= MARGIN * seconds[LINEAR] else LINEAR


def measure_plan(dtype: torch.dtype, prepacked: bool = False) -> Plan:
    """The fastest right routine for each class of rows on this CPU, by timing a [4096, 1280]
    weight.

    prepacked: also time weights in oneDNN's own layout. Takes about a second, once a process and
    number of threads: what was fastest then is kept. A routine whose product isn't F.linear's isn't
    timed: what does a part of the work looks fast. If oneDNN doesn't take the dtype, everything is
    F.linear.
    """
    return _measured(dtype, prepacked, torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, prepacked: bool, threads: int) -> Plan:
    if not onednn_takes(dtype):
        return Plan()
    generator = torch.Generator().manual_seed(0)
    # Four weights in turn, so that a single row reads from memory as it does in a model.
    weights = [torch.randn(4096, 1280, generator=generator).mul_(0.03).to(dtype) for _ in range(4)]
    prepacks = [prepacked_copy(w) for w in weights] if prepacked else []
    with torch.inference_mode():
        one, few, many = (
            _best_seconds(_candidates(rows, weights, prepacks, generator), rounds)
            for rows, rounds in ((1, 40), (8, 30), (256, 10))
        )
    training = {name: seconds for name, seconds in many.items() if name != PREPACKED}
    return Plan(_fastest(one), _fastest(few), _fastest(many), _fastest(training))


def _candidates(
    rows: int, weights: list[Tensor], prepacks: list[Tensor], generator: torch.Generator
) -> dict[str, Callable[[], object]]:
    """F.linear and the other routines that are right, each with the next weight at each call."""
    x = torch.randn(rows, weights[0].shape[1], generator=generator).to(weights[0].dtype)
    routines = {ONEDNN: (onednn, weights)}
    if rows == 1:
        routines[MV] = mv, weights
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
