"""How fast a run is: tokens a second, and the share of the machine's peak that the model uses.

MFU = floating-point operations of the model's matrix products / seconds / peak of all processes.
Operations are those of whole causal sequences, also where they hold several documents (their
attention needs less, so MFU is a little too high there), and a layer that is recomputed in the
backward pass counts once.
"""

import sys
from functools import cache

import torch

from ..bench.ceilings import matmul_ceiling
from ..devices import datasheet
from ..openelm.config import OpenELMConfig
from ..openelm.costs import matmul_operations


@cache
def peak(dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """Operations a second that one process could reach at best, and where the number is from."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if (stated := datasheet(name)) is not None:
            return stated.bf16, f"stated for {name}"
    return matmul_ceiling(dtype, device), "the fastest matrix product, measured"


def operations(config: OpenELMConfig, length: int) -> int:
    """Of one sequence in a training step."""
    return matmul_operations(config, length, length, training=True)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has had so far: on a GPU there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
