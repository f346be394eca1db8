"""In which modes a model can be decoded, and why not in the others.

one-launch   `ops.decode_step`: the whole decoder in one kernel
graph        the model's own layers, captured as a CUDA graph
calls        one operation after the other, waiting for each token
"""

from typing import Any

import torch
from torch import nn

from .. import devices
from ..backends import BACKENDS, REFERENCE, Reason, choose
from ..checks import DTYPES
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..ops.decode_step import MAX_BATCH
from ..surgery import given_backend, is_accelerated
from .decoder_weights import snapshot_of

ONE_LAUNCH, GRAPH, CALLS = "one-launch", "graph", "calls"
DECODE_MODES = (ONE_LAUNCH, GRAPH, CALLS)
MOST_LAYERS = 128  # of csrc/cuda/decode/plan.cuh: their places in the cache are its parameters
_KERNEL = "cuda"  # the backend that has decode_step on a GPU


def modes_of(model: nn.Module, device: torch.device) -> dict[str, Reason | None]:
    """{mode: why a model can't be decoded in it on a device, or None}, of GRAPH and ONE_LAUNCH.

    What a cache adds (see `missing`), and a capture that fails, is known later.
    """
    if device.type != "cuda":
        reason = f"it needs a CUDA device, the model is on {device}"
        return {GRAPH: reason, ONE_LAUNCH: reason}
    reason = _missing_weights(model)
    return {GRAPH: reason, ONE_LAUNCH: reason or _missing_kernel(model, device)}


def missing(mode: str, model: Any, cache: KVCache) -> Reason | None:
    """Why a model can't be decoded with this cache in one of the DECODE_MODES, or None. No GPU is
    asked for: the same steps can be called elsewhere.
    """
    if mode == CALLS:
        return None
    if devices.autocast_dtype(cache.device.type) is not None:
        return "autocast is on"
    if reason := _missing_weights(model):
        return reason
    if snapshot_of(model).dtypes != {cache.dtype}:
        found = model.norm.weight.dtype
        return f"the weights must be {cache.dtype} like the cache, got {found}"
    if mode == GRAPH:
        return None
    if cache.batch > MAX_BATCH:
        return f"decode_step takes at most {MAX_BATCH} sequences, got {cache.batch}"
    return _missing_kernel(model, cache.device)


def wanted(model: Any, cache: KVCache) -> bool:
    """Whether a model is decoded without waiting if no mode is named: on a GPU, unless it is the
    reference model as it was made.
    """
    if cache.device.type != "cuda" or missing(GRAPH, model, cache):
        return False
    return is_accelerated(model) or snapshot_of(model).compressed


def _missing_weights(model: nn.Module) -> Reason | None:
    """Why a model's steps can't be described by its weights."""
    if not isinstance(model, OpenELM):
        return f"the model is a {type(model).__name__}, not an elmkernels.OpenELM"
    try:
        known = snapshot_of(model)
    except ValueError as error:
        return str(error)
    if len(known.dtypes) > 1:
        found = ", ".join(sorted(map(str, known.dtypes)))
        return f"all weights must be of one dtype, got {found}"
    return None


def _missing_kernel(model: Any, device: torch.device) -> Reason | None:
    """Why `ops.decode_step` has no kernel for a model on a device."""
    dtype, given = model.norm.weight.dtype, given_backend(model, "decode_step")
    if dtype not in DTYPES:
        return f"decode_step takes {', '.join(map(str, DTYPES))}, the model is {dtype}"
    if device.type != "cuda":
        if choose("decode_step", device.type, given) == REFERENCE:
            return f"decode_step has no kernel here: {BACKENDS[_KERNEL].missing}"
        return None
    if reason := devices.missing_backends(device)[_KERNEL]:
        return f"its kernel is backend {_KERNEL!r}: {reason}"
    if given == REFERENCE:
        return f"its kernel is backend {_KERNEL!r}, the model was given {REFERENCE!r}"
    layers = len(model.layers)
    if layers > MOST_LAYERS:
        return f"decode_step on CUDA takes at most {MOST_LAYERS} layers, the model has {layers}"
    if devices.cooperative(device) is False:
        return "decode_step needs a device with cooperative launches, this one has none"
    return None
