"""Which ops of this package a model in vLLM runs; nothing here knows vLLM."""

import torch

from ...backends import REFERENCE, Reason, choose, missing_kernels
from ...processors import KIND, SERVED

# vLLM's name of each of its custom ops that is ours: the ops of this package that it is.
CUSTOM_OPS = {
    "elmkernels_rms_norm": ("rms_norm", "add_rms_norm"),
    "elmkernels_qk_norm_rope": ("qk_norm_rope",),
    "elmkernels_swiglu": ("swiglu",),
    "elmkernels_linear": ("linear",),
}


def backend_of(name: str, device: str) -> str | None:
    """The backend that one of CUSTOM_OPS takes on a type of device; None if none of our kernels
    runs there, as vLLM's own then do.

    It is named once, when the model is built: what is compiled for any number of tokens must not
    decide by that number.
    """
    if missing(device) is not None:
        return None
    found = {choose(op, device, None) for op in CUSTOM_OPS[name]}
    return found.pop() if len(found) == 1 and REFERENCE not in found else None


def missing(device: str) -> Reason | None:
    """Why none of our kernels runs on a type of device; None if they do."""
    if device not in ("cpu", "cuda"):
        return f"there are kernels for cpu and cuda, not for {device}"
    return missing_kernels(device)


def line(chosen: dict[str, str | None], device: str) -> str:
    """What is logged once: which ops run, and why the others are vLLM's.

    Args:
        chosen: {name of CUSTOM_OPS: its backend, None for vLLM's own}.
        device: the type of device.
    """
    ours = {
        op: f"{op} ({backend})"
        for name, backend in chosen.items()
        if backend is not None
        for op in CUSTOM_OPS[name]
    }
    theirs = [op for name in chosen for op in CUSTOM_OPS[name] if op not in ours]
    parts = [f"elmkernels runs {', '.join(ours.values())}"] if ours else []
    if theirs:
        why = missing(device) or "switched off by custom_ops"
        parts.append(f"vLLM's own run {', '.join(theirs)}: {why}")
    return "; ".join(parts)


def most_rows(dtype: torch.dtype, device: str) -> int:
    """How many rows a product may have that `linear`'s kernel is faster at than vLLM's own, which
    reads a layout of its own; 0 if that was not measured on such a processor.
    """
    found = SERVED.get((KIND, dtype))
    if device != "cpu" or found is None or backend_of("elmkernels_linear", device) is None:
        return 0
    return found.choice


def products_line(most: int, dtype: torch.dtype, device: str) -> str:
    """What is logged once about products."""
    if most:
        backend = backend_of("elmkernels_linear", device)
        return f"elmkernels multiplies up to {most} rows ({backend}), vLLM's own more"
    why = missing(device) or f"{dtype} was not measured to be faster on {KIND} processors"
    return f"vLLM's own run linear: {why}"
