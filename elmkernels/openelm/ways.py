"""In which ways a model can be decoded on a GPU beside one call an operation, and why not."""

import torch
from torch import nn

from .. import gpu
from ..checks import DTYPES
from .model import OpenELM
from .stack import described

GRAPH, ONE_LAUNCH = "graph", "one-launch"
MOST_LAYERS = 128  # of csrc/cuda/decode_plan.cuh: their places in the cache are its parameters
_KERNEL = "cuda"  # the backend that has decode_step on a GPU


def ways(model: nn.Module, device: torch.device) -> dict[str, str | None]:
    """{way: None, or why a model can't be decoded in it on a device}, of GRAPH and ONE_LAUNCH.

    What a cache adds (its dtype and batch), and a capture that fails, is known later.
    """
    reason = _neither(model, device)
    return {GRAPH: reason, ONE_LAUNCH: reason or _not_in_one_launch(model, device)}


def _neither(model: nn.Module, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, the model is on {device}"
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


def _not_in_one_launch(model: OpenELM, device: torch.device) -> str | None:
    if why := gpu.backends_of(device)[_KERNEL]:
        return f"its kernel is backend {_KERNEL!r}: {why}"
    dtype = model.norm.weight.dtype
    if dtype not in DTYPES:
        return f"decode_step takes {', '.join(map(str, DTYPES))}, the model is {dtype}"
    layers = len(model.layers)
    if layers > MOST_LAYERS:
        return f"decode_step on CUDA takes at most {MOST_LAYERS} layers, the model has {layers}"
    if gpu.cooperative(device) is False:
        return "decode_step needs a device with cooperative launches, this one has none"
    return None
