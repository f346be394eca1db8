"""Floating-point operations of the ops' matrix products, for torch's FlopCounterMode.

Each op gives the formula of each of its raw kernels; those that multiply no matrices count 0, as
torch counts its own. torch's module of formulas imports Triton where that is installed, which takes
0.2 s: it is given ours when someone imports it.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..backends import BACKENDS, declared, optional_kernel

_MODULE = "torch.utils.flop_counter"
_WAITING: dict[Any, Callable[..., int]] = {}  # {operator: formula of its arguments}


def no_products(*args: Any) -> int:
    """Of a kernel that multiplies no matrices."""
    return 0


def counted(op: str, **formulas: Callable[..., int]) -> None:
    """Give an op's raw kernels their formulas, by suffix; those without one count 0."""
    for suffix in declared(op):
        name, formula = f"{op}_{suffix}", formulas.get(suffix, no_products)
        for backend in BACKENDS:
            if (raw := optional_kernel(name, backend)) is not None:
                counts(raw.overloadpacket, formula)


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
