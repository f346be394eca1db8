"""In which ways a model can be decoded, and why not in the others.

one-launch   `ops.decode_step`: the whole decoder in one kernel
graph        the model's own layers, captured as a CUDA graph
calls        one operation after the other, waiting for each token
"""

import torch
from torch import nn

from .. import gpu
from ..backends import BACKENDS, REFERENCE, choose, where_it_has
from ..checks import DTYPES
from ..ops.decode_step import MAX_BATCH
from .cache import KVCache
from .model import OpenELM
from .stack import described
from .swap import asked_backend, is_accelerated

ONE_LAUNCH, GRAPH, CALLS = "one-launch", "graph", "calls"
WAYS = (ONE_LAUNCH, GRAPH, CALLS)
MOST_LAYERS = 128  # of csrc/cuda/decode/plan.cuh: their places in the cache are its parameters
_KERNEL = "cuda"  # the backend that has decode_step on a GPU


def ways(model: nn.Module, device: torch.device) -> dict[str, str | None]:
    """{way: None, or why a model can't be decoded in it on a device}, of GRAPH and ONE_LAUNCH.

    What a cache adds (see `why_not`), and a capture that fails, is known later.
    """
    if device.type != "cuda":
        reason = f"it needs a CUDA device, the model is on {device}"
        return {GRAPH: reason, ONE_LAUNCH: reason}
    reason = _undescribed(model)
    return {GRAPH: reason, ONE_LAUNCH: reason or _no_kernel(model, device)}


def why_not(way: str, model: nn.Module, cache: KVCache) -> str | None:
    """Why a model can't be decoded with this cache in one of the WAYS, or None. It doesn't ask for
    a GPU: the same steps can be called elsewhere.
    """
    if way == CALLS:
        return None
    kind = cache.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "autocast is on"
    if reason := _undescribed(model):
        return reason
    if described(model).dtypes != {cache.dtype}:
        found = model.norm.weight.dtype
        return f"the weights must be {cache.dtype} like the cache, got {found}"
    if way == GRAPH:
        return None
    if cache.batch > MAX_BATCH:
        return f"decode_step takes at most {MAX_BATCH} sequences, got {cache.batch}"
    return _no_kernel(model, cache.device)


def wanted(model: nn.Module, cache: KVCache) -> bool:
    """Whether a model is decoded without waiting where no way was named: on a GPU, unless it is the
    reference model as it was made.
    """
    if cache.device.type != "cuda" or why_not(GRAPH, model, cache):
        return False
    return is_accelerated(model) or described(model).compressed


def step_backend(model: OpenELM) -> str | None:
    """What accelerate was asked for, where decode_step can be had of it."""
    return where_it_has("decode_step", asked_backend(model))


def _undescribed(model: nn.Module) -> str | None:
    """Why a model's steps can't be described by its weights."""
    if not isinstance(model, OpenELM):
        return f"the model is a {type(model).__name__}, not an elmkernels.OpenELM"
    try:
        known = described(model)
    except ValueError as error:
        return str(error)
    if len(known.dtypes) > 1:
        found = ", ".join(sorted(map(str, known.dtypes)))
        return f"all weights must be of one dtype, got {found}"
    return None


def _no_kernel(model: OpenELM, device: torch.device) -> str | None:
    """Why `ops.decode_step` has no kernel for a model on a device."""
    dtype = model.norm.weight.dtype
    if dtype not in DTYPES:
        return f"decode_step takes {', '.join(map(str, DTYPES))}, the model is {dtype}"
    if device.type != "cuda":
        if choose("decode_step", device.type, step_backend(model)) == REFERENCE:
            return f"decode_step has no kernel here: {BACKENDS[_KERNEL].missing}"
        return None
    if why := gpu.backends_of(device)[_KERNEL]:
        return f"its kernel is backend {_KERNEL!r}: {why}"
    if step_backend(model) == REFERENCE:
        return f"its kernel is backend {_KERNEL!r}, the model was given {REFERENCE!r}"
    layers = len(model.layers)
    if layers > MOST_LAYERS:
        return f"decode_step on CUDA takes at most {MOST_LAYERS} layers, the model has {layers}"
    if gpu.cooperative(device) is False:
        return "decode_step needs a device with cooperative launches, this one has none"
    return None
