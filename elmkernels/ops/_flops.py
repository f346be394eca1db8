"""Floating-point operations of the ops' matrix products: the one place that counts them.

The records of `testing` read the formulas and, by the arguments of raw kernels, torch's
FlopCounterMode. Each op gives the formula of each of its raw kernels; those that multiply no
matrices count 0, as torch counts its own. torch's module of formulas imports Triton if that is
installed, which takes 0.2 s: it is given ours when someone imports it.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from torch import Tensor

from ..backends import BACKENDS, declared, optional_kernel
from ..weights.formats import Weight
from ..weights.table import matrices_of

_MODULE = "torch.utils.flop_counter"
_WAITING: dict[Any, Callable[..., int]] = {}  # {operator: formula of its arguments}


def of_linear(x: Tensor, weight: Weight, *rest: object) -> int:
    """The product of x [..., k] with a weight of n rows, in any form."""
    return 2 * x.numel() * weight.shape[0]


def of_attention(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> int:
    """Two products of the pairs that see each other, by q [batch, lq, q_heads, head_dim] and k
    [batch, lk, ...]; of documents their own pairs alone."""
    batch, lq, heads, head_dim = q.shape
    lk = k.shape[1]
    pairs = batch * (lq * (lk - lq) + lq * (lq + 1) // 2)  # causal
    if cu_seqlens is not None:
        pairs = sum(n * (n + 1) // 2 for n in cu_seqlens.diff().tolist())
    return 4 * heads * head_dim * pairs


def of_attention_bwd(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> int:
    """The backward makes five products of the forward's two, scores among them."""
    return of_attention(q, k, cu_seqlens) * 5 // 2


def attention_fwd(q, k, v, key_mask, offsets, cu_seqlens, scale) -> int:
    return of_attention(q, k, cu_seqlens)


def attention_bwd(dout, q, k, v, out, lse, key_mask, offsets, cu_seqlens, scale) -> int:
    return of_attention_bwd(q, k, cu_seqlens)


def of_losses(hidden: Tensor, weight: Tensor, products: int = 1) -> int:
    """As many products of all rows: one for the logits, one for each gradient."""
    return 2 * products * hidden.numel() * weight.shape[0]


def losses(hidden, weight, targets, dloss, ignore, z_loss, smoothing, dhidden, dweight, *_) -> int:
    return of_losses(hidden, weight, 1 + dhidden + dweight)


def of_step(matrices: Iterable[tuple[int, int]], batch: int) -> int:
    """The products of one token of each sequence with matrices [n, k]."""
    return 2 * batch * sum(n * k for n, k in matrices)


def step_fwd(table: Tensor, tokens: Tensor, *rest: object) -> int:
    *layers, last = table.tolist()
    matrices = [m for row in layers for m in matrices_of(row)] + matrices_of(last)[1:]
    return of_step(matrices, tokens.numel())


def no_products(*args: Any) -> int:
    """Of a kernel that multiplies no matrices."""
    return 0


def counted(op: str, **formulas: Callable[..., int]) -> None:
    """Give an op's raw kernels their formulas, by suffix; those without one count 0."""
    for suffix in declared(op):
        name, formula = f"{op}_{suffix}", formulas.get(suffix, no_products)
        for backend in BACKENDS:
            if (raw := optional_kernel(name, backend)) is not None:
                counts(cast(Any, raw).overloadpacket, formula)


def counts(operator: Any, formula: Callable[..., int]) -> None:
    """Give one operator its formula, of the operator's own arguments."""
    _WAITING[operator] = formula
    if _MODULE in sys.modules:
        _give(sys.modules[_MODULE])


def _give(module: ModuleType) -> None:
    while _WAITING:
        operator, formula = _WAITING.popitem()

        def of_call(*args: Any, out_val: Any = None, formula: Callable = formula, **_: Any) -> int:
            return formula(*args)

        if operator in module.flop_registry:  # torch's own formula, of its own operation
            continue
        module.register_flop_formula(operator, get_raw=True)(of_call)


class _WhenImported(MetaPathFinder):
    """Gives the formulas as soon as torch's module has run, then is gone."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _give(module)

            spec.loader.exec_module = exec_module
        return spec


if _MODULE not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
