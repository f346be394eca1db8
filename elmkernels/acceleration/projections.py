"""Projections: the matrix products are borrowed from torch, and chosen by measuring them here.

torch reaches several GEMM libraries on a CPU, and which one is fast depends on the processor: in
float32 `F.linear` runs on MKL, which is slow on processors that are not Intel's; in bfloat16 a
product with one row leaves more of the memory's speed unused in `F.linear` than in `torch.mv`.
`measure_plan` times the candidates once per dtype and process and takes another than
`F.linear` only where it is clearly faster. All of them accumulate in float32.

A prepacked copy (oneDNN's own blocked layout) is optional, because it doubles a weight's memory. It
is used for one state of the weight only: its version, address and dtype are compared at every call
(a load, a move, most optimizers), and because fused optimizers don't count versions, a pass that
keeps gradients drops the copy and none is made or used while the weight has a gradient. What torch
can't see is a write through `weight.data` between two calls without gradients: `accelerate` again
then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..derivatives import unusual
from ..openelm.compressed import product
from ..ops._cost import of_linear
from ..ops._flops import counts
from ..weights.formats import Weight

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


if torch.backends.mkldnn.is_available():  # torch has no formula of its own for it
    counts(torch.ops.mkldnn._linear_pointwise, of_linear)


@cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a dtype on this processor: float16 it doesn't on every one."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(16, 16, dtype=dtype, device="cpu")
    try:
        onednn(x, x)
    except RuntimeError:
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
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # oneDNN's products can't be differentiated again, torch's can.
        multiply = F.linear if torch.is_grad_enabled() else onednn
        dx = multiply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = multiply(dy.flatten(0, -2).t(), x.flatten(0, -2).t())
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
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
        return dx, dweight, None


class Linear(nn.Module):
    """nn.Linear with the plan's routines; shares the Parameters of the module it replaces."""

    plain_matrix = True  # see `openelm.loss.plain_weight`

    def __init__(self, original: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.weight, self.bias, self.plan = original.weight, original.bias, plan
        self.out_features, self.in_features = original.weight.shape
        self.products = Products(plan)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.linear(x, self.weight, self.bias)
        return self.products(x, self.weight)

    def train(self, mode: bool = True) -> "Linear":
        if mode:
            self.products.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.plan}"


class TiedHead(nn.Module):
    """The output projection by the embedding's weight, with the plan's routines; a compressed one
    is multiplied by a backend of `ops.linear`.
    """

    def __init__(self, plan: Plan, backend: str | None = None) -> None:
        super().__init__()
        self.products, self.backend = Products(plan), backend

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        if not isinstance(weight, Tensor):
            return product(x, weight, self.backend)
        return self.products(x, weight)

    def train(self, mode: bool = True) -> "TiedHead":
        if mode:
            self.products.drop()
        return super().train(mode)


class Products:
    """x @ weight.T by a plan, with the prepacked copy of one weight if the plan asks for it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._prepacked: Tensor | None = None
        self._prepacked_of: tuple | None = None

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if unusual():
            return F.linear(x, weight)
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
            self.drop()
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
        version = 0 if weight.is_inference() else weight._version
        state = (weight.data_ptr(), version, weight.dtype, weight.shape)
        if state != self._prepacked_of:
            self._prepacked = prepacked_copy(weight)
            self._prepacked_of = state
        return self._prepacked

    def drop(self) -> None:
        self._prepacked = self._prepacked_of = None

    @property
    def nbytes(self) -> int:
        """Bytes of the prepacked copy, as long as there is one."""
        if self._prepacked_of is None:
            return 0
        _, _, dtype, shape = self._prepacked_of
        return shape.numel() * dtype.itemsize

    def __getstate__(self) -> dict:
        # oneDNN's layout can't be pickled or deep-copied: a copy prepacks again at its first call.
        return {"plan": self.plan, "_prepacked": None, "_prepacked_of": None}


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


@cache
def measure_plan(dtype: torch.dtype, prepacked: bool = False) -> Plan:
    """The fastest routine for each class of rows on this CPU, by timing a [4096, 1280] weight.

    prepacked: also time weights in oneDNN's own layout. Takes about half a second, once a process:
    what was fastest then is kept. If oneDNN doesn't take the dtype, everything is F.linear.
    """
    if not onednn_takes(dtype):
        return Plan()
    generator = torch.Generator().manual_seed(0)
    # Four weights in turn, so that a single row reads from memory as it does in a model.
    weights = [torch.randn(4096, 1280, generator=generator).mul_(0.03).to(dtype) for _ in range(4)]
    prepacks = [prepacked_copy(w) for w in weights] if prepacked else []
    turn = [0]

    def take(candidates: list[Tensor]) -> Tensor:
        turn[0] += 1
        return candidates[turn[0] % len(candidates)]

    def candidates(rows: int) -> dict[str, Callable[[], object]]:
        x = torch.randn(rows, 1280, generator=generator).to(dtype)
        fns: dict[str, Callable[[], object]] = {LINEAR: lambda: F.linear(x, take(weights))}
        if rows == 1:
            fns[MV] = lambda: mv(x, take(weights))
        fns[ONEDNN] = lambda: onednn(x, take(weights))
        if prepacked:
            fns[PREPACKED] = lambda: onednn(x, take(prepacks))
        return fns

    with torch.inference_mode():
        one, few, many = (
            _best_seconds(candidates(rows), rounds)
            for rows, rounds in ((1, 40), (8, 30), (256, 10))
        )
    training = {name: seconds for name, seconds in many.items() if name != PREPACKED}
    return Plan(_fastest(one), _fastest(few), _fastest(many), _fastest(training))
