"""Dispatch: which backends exist, why one can't run here, and which an op takes.

Two tables of preference depend on a call's tensors: `FEW`, of few rows, and attention's own, in
ops/_attention_choice. What this very GPU can run is asked outside of dispatch, by
`devices.backend_choices`.

A backend is a name, its devices, and the reason why it can't run here, if it can't. Every raw
kernel `rms_norm_fwd` is the torch op `elmkernels_<backend>::rms_norm_fwd`. Availability is decided
once, at import; after that dispatch only reads dicts, which `torch.compile` can trace.
"""

import importlib
import importlib.util
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import libraries
from .libraries import build_report as build_report

REFERENCE = "reference"
SDPA = "sdpa"  # attention by torch's own scaled_dot_product_attention
# Why something can't be had, in words. What looks for one returns `Reason | None`, is called
# `missing`, and returns None if nothing is in the way.
Reason = str


@dataclass(frozen=True)
class Backend:
    """One way to run the kernels: `missing` is None, or the reason why it can't run here."""

    name: str
    devices: tuple[str, ...]
    missing: Reason | None = None


def _cpu_lacks(*needs: tuple[str, str]) -> str | None:
    """Why this processor can't run an instruction set, by torch's own detection."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"needs an x86-64 processor, this is {platform.machine()}"
    for capability, flag in needs:
        supported = getattr(torch.cpu, flag, None)
        if supported is None:
            return f"torch {torch.__version__} can't tell whether this processor has {capability}"
        if not supported():
            return f"this processor has no {capability}"
    return None


def _cuda_lacks() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


def _triton_lacks(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None if interpreted else _cuda_lacks()


# In order of preference: {library: what the processor needs, and torch.cpu's function that knows}.
_INSTRUCTION_SETS = {
    "avx512_bf16": (
        ("AVX-512 with bfloat16", "_is_avx512_bf16_supported"),
        ("AVX-512 with VNNI", "_is_vnni_supported"),
    ),
    "avx512_amx": (("AMX", "_is_amx_tile_supported"),),
    "avx512": (("AVX-512", "_is_avx512_supported"),),
    "avx2": (("AVX2", "_is_avx2_supported"),),
}
# {library of a few kernels: the one whose kernels are its others}. Tiles multiply bfloat16 alone:
# other dtypes are the other library's too.
BASES = {"avx512_amx": "avx512_bf16"}


def _cpu_backend(name: str, *needs: tuple[str, str]) -> Backend:
    missing = _cpu_lacks(*needs) or libraries.load(name)
    if missing is None and (base := BASES.get(name)):
        missing = _missing_base(base, _cpu_backend(base, *_INSTRUCTION_SETS[base]).missing)
    return Backend(name, ("cpu",), missing)


def _missing_base(base: str, missing: Reason | None) -> Reason | None:
    return missing and f"most of its kernels are those of {base}: {missing}"


def _detect() -> dict[str, Backend]:
    # Triton's own switch: its kernels then run on CPU tensors, slowly, for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    found = (
        *(_cpu_backend(name, *row) for name, row in _INSTRUCTION_SETS.items()),
        Backend("cuda", ("cuda",), _cuda_lacks() or libraries.load("cuda")),
        Backend(
            "triton", ("cuda", "cpu") if interpreted else ("cuda",), _triton_lacks(interpreted)
        ),
        Backend(SDPA, ("cpu", "cuda")),
        Backend(REFERENCE, ("cpu", "cuda")),
    )
    return {backend.name: backend for backend in found}


BACKENDS: dict[str, Backend] = _detect()


class Traits(NamedTuple):
    """How models choose the backend of an op.

    by_rows: few rows may take another than many. falls_back: if the backend that is named for a
    model lacks the op, another one takes its place. whole_model: it runs a decoder, not a module.
    """

    by_rows: bool = False
    falls_back: bool = False
    whole_model: bool = False


class Preference(NamedTuple):
    """Backends in order, and on what grounds."""

    order: tuple[str, ...]
    grounds: str


# Backends in order of preference for each device. The CUDA C++ kernels and the Triton ones have
# not been measured against each other on a GPU yet; Triton's are for many rows, so they go first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": (*_INSTRUCTION_SETS, SDPA),
    "cuda": ("triton", "cuda", SDPA),
}
# The libraries of csrc/cpu: what is written for one is compiled for all.
CPU = tuple(name for name in _INSTRUCTION_SETS if name not in BASES)
# What tiles change. No processor with tiles was at hand, so their backend stands behind its base: a
# call takes it if it is named.
AMX = "avx512_amx"
AMX_GROUNDS = (
    "not measured; counted for bfloat16 at head_dim 64: 32 rows by 128 keys of attention take "
    "1,000 cycles of products, 300 of storing tiles and 2,300 of softmax; without tiles the "
    "products alone take 24,000"
)
# Of few rows the time is what the launch costs, of many the memory: ops `by_rows` take another
# order for up to FEW_ROWS rows on the devices of FEW. Gradients have none: a training step has more
# rows than these.
FEW_ROWS = 16
FEW: dict[str, Preference] = {
    "cuda": Preference(
        ("cuda", "triton"),
        "reasoned, not measured: a Triton launch costs tens of us of host time, a C++ one about 5; "
        "inside a CUDA graph they are equal",
    )
}

_KERNELS: dict[tuple[str, str], Callable] = {}
_CHOICE: dict[tuple[str, str, str | None], str] = {}
# What `define` was told of each op: its raw kernels' suffixes, its backends, its own orders.
_OPS: dict[str, tuple[str, ...]] = {}
_HAVE: dict[str, tuple[str, ...]] = {}
_TRAITS: dict[str, "Traits"] = {}
_ORDER: dict[tuple[str, str], tuple[str, ...]] = {}

# Backends that are torch's own operations, not raw kernels.
COMPOSED = (SDPA, REFERENCE)
# Backends whose kernels are in a library that was compiled when elmkernels was installed.
COMPILED = (*_INSTRUCTION_SETS, "cuda")


def implements(backend: str, op: str) -> bool:
    """Whether a backend, other than the reference, has an op at all, able to run here or not."""
    return backend in _HAVE.get(op, ())


def defined() -> tuple[str, ...]:
    """The ops that have kernels, of whichever backend."""
    return tuple(_OPS)


def declared(op: str) -> tuple[str, ...]:
    """The suffixes of an op's raw kernels: "fwd", "bwd", ..."""
    return _OPS[op]


def traits(op: str) -> Traits:
    """How models choose the backend of an op."""
    return _TRAITS.get(op, Traits())


def define(
    op: str,
    backends: tuple[str, ...],
    order: dict[str, tuple[str, ...]] | None = None,
    traits: Traits | None = None,
    **kernels: tuple[str, Callable] | tuple[str, Callable, tuple[str, ...]],
) -> None:
    """Declare an op's raw kernels for every backend that has them.

    Args:
        op: its name.
        backends: those that have it, the reference aside.
        order: {device type: backends}, best first, where that isn't PREFERENCE.
        traits: how models choose its backend, where that isn't the usual.
        kernels: {suffix: (schema, fake)}, and the backends that have it if some of the op's don't:
            `optional_kernel` says so to their callers.
    """
    _OPS[op], _HAVE[op], _TRAITS[op] = tuple(kernels), backends, traits or Traits()
    _ORDER.update({(op, device): names for device, names in (order or {}).items()})
    for backend in tuple(BACKENDS.values()):
        if backend.name in COMPOSED or not implements(backend.name, op):
            continue
        for suffix, (schema, fake, *some) in kernels.items():
            name = f"{op}_{suffix}"
            if some and backend.name not in some[0]:
                continue
            qualified = f"elmkernels_{backend.name}::{name}"
            torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, _unless_onnx(op, fake))
            if backend.name == "triton" and backend.missing is None:
                for device in backend.devices:
                    torch.library.impl(qualified, device, _late(op, name))
            namespace = getattr(torch.ops, f"elmkernels_{backend.name}")
            _KERNELS[name, backend.name] = getattr(namespace, name).default
            if backend.name in COMPILED and backend.missing is None:
                _withdraw_if(backend.name, libraries.lacks(backend.name, name, backend.devices[0]))
    for suffix, (name, base) in itertools.product(kernels, BASES.items()):
        raw = f"{op}_{suffix}"
        if (raw, base) in _KERNELS:
            _KERNELS.setdefault((raw, name), _KERNELS[raw, base])
    _decide(op)


def _unless_onnx(op: str, fake: Callable) -> Callable:
    """The fake, which every trace calls, but for ONNX: it has no form of a kernel, and its exporter
    would name the operator without a way out."""

    def traced(*args):
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"{op} by a kernel can't be exported to ONNX: call elmkernels.restore(model) "
                'before torch.onnx.export, or the op with backend="reference"'
            )
        return fake(*args)

    return traced


def _withdraw_if(name: str, missing: str | None) -> None:
    """A library that lacks a kernel it should have is of another version: nothing of it is used."""
    backend = BACKENDS[name]
    if missing is None or backend.missing is not None:
        return
    BACKENDS[name] = replace(backend, missing=missing)
    _CHOICE.clear()
    for op in _OPS:
        _decide(op)
    for other, base in BASES.items():
        if base == name:
            _withdraw_if(other, _missing_base(base, missing))


def _late(op: str, name: str) -> Callable:
    """Triton takes 0.3 s to import, so its modules are imported at the first launch."""

    def launch(*args):
        return getattr(importlib.import_module(f"elmkernels.triton.{op}"), name)(*args)

    return launch


def preferred(op: str, device: str) -> list[str]:
    """The backends, besides the reference, that have an op on a device type, best first; able to
    run here or not.
    """
    return [n for n in _ORDER.get((op, device), PREFERENCE[device]) if implements(n, op)]


def usable(op: str, device: str) -> list[str]:
    """Those of the preferred ones that can run here."""
    return [n for n in preferred(op, device) if BACKENDS[n].missing is None]


def missing_kernels(device: str) -> str | None:
    """Why none of our kernels runs on a type of device, and what mends it, if that is known.

    Models and ops then run as the reference does, and a measurement would compare it with itself.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The reason and, if an installation can mend it, the command; None if there are kernels.

    Raises:
        ValueError: the device is of another type.

    Example:
        >>> if reason := missing_kernels("cpu"):
        ...     print(reason)
    """
    if device not in PREFERENCE:
        raise ValueError(f"device must be {' or '.join(PREFERENCE)}, got {device!r}")
    ours = [BACKENDS[name] for name in PREFERENCE[device] if name not in COMPOSED]
    reasons = [backend.missing for backend in ours if backend.missing is not None]
    if len(reasons) < len(ours):
        return None
    # A processor that lacks AVX2 lacks the others too; one that has it needs its library alone.
    said = reasons[-1:] if device == "cpu" else dict.fromkeys(reasons)
    return f"no compiled kernels: {'; '.join(said)}"


def _decide(op: str) -> None:
    for device in PREFERENCE:
        _CHOICE[op, device, None] = (usable(op, device) + [REFERENCE])[0]
    for backend in BACKENDS.values():
        name = backend.name
        if not implements(name, op) and implements(BASES.get(name, ""), op):
            name = BASES[name]
        if backend.missing is None and (name == REFERENCE or implements(name, op)):
            for device in backend.devices:
                _CHOICE[op, device, backend.name] = name


def kernel(name: str, backend: str) -> Callable:
    """The raw kernel `name` ("rms_norm_fwd") of one backend."""
    return _KERNELS[name, backend]


def of_dtype(backend: str, dtype: torch.dtype) -> str:
    """The backend whose kernels one runs in a dtype: itself, but for tiles, which take bfloat16."""
    return backend if dtype == torch.bfloat16 else BASES.get(backend, backend)


def optional_kernel(name: str, backend: str) -> Callable | None:
    """The same, or None where the backend does without it."""
    return _KERNELS.get((name, backend))


def choose(op: str, device: str, backend: str | None, order: tuple[str, ...] = ()) -> str:
    """The backend an op takes on a device type: the one the caller named, or the first of `order`
    that can run it here, or the preferred one.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that
    can't run the op here: a named backend never falls back to another.
    """
    if backend is None:
        for name in order:
            if (op, device, name) in _CHOICE:
                return name
    elif not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {type(backend).__name__}")
    chosen = _CHOICE.get((op, device, backend))
    if chosen is None:
        _refuse(op, device, backend)
    return chosen


def rows_backend(op: str, named: str | None, x: Tensor, *weights: Tensor | None) -> str:
    """The backend of a call on x [..., n]: the named one, or the first that can run here in the
    order for x's device, its number of rows, and whether x or a weight asks for a gradient.
    """
    device = x.device.type
    if named is None and device in FEW and x.numel() <= FEW_ROWS * x.shape[-1]:
        wants = any(t is not None and t.requires_grad for t in (x, *weights))
        if not (wants and torch.is_grad_enabled()):
            return choose(op, device, None, FEW[device].order)
    return choose(op, device, named)


def _refuse(op: str, device: str, name: str | None) -> NoReturn:
    if name is None:
        raise RuntimeError(f"{op} runs on {' or '.join(PREFERENCE)}, got a tensor on {device}")
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if backend.missing is not None:
        raise RuntimeError(f"backend {name!r} can't run here: {backend.missing}")
    if name != REFERENCE and not implements(name, op):
        raise RuntimeError(f"backend {name!r} has no kernels for {op}")
    raise RuntimeError(
        f"backend {name!r} runs {op} on {' or '.join(backend.devices)}, got a tensor on {device}"
    )
