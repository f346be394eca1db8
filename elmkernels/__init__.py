"""elmkernels: Apple's OpenELM language models on fused kernels, proved against the reference."""

from . import interrupts as _interrupts

try:
    _interrupts.answer_at_start()  # loading torch takes long
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    needs = "elmkernels needs torch >= 2.10, which is not installed: pip install torch"
    raise ImportError(needs, name="torch") from None

from . import ops, reference
from .acceleration.routines import Plan
from .acceleration.swap import accelerate, restore
from .compression.packing import pack, unpack
from .compression.quantization import quantize
from .generation.session import generate
from .openelm import OpenELM, OpenELMConfig
from .ops import *  # noqa: F403  ops/__init__ has the one list of them
from .reference import rope_table

__version__ = "0.1.0"

__all__ = [
    "OpenELM",
    "OpenELMConfig",
    "Plan",
    "accelerate",
    "generate",
    "pack",
    "quantize",
    "reference",
    "restore",
    "rope_table",
    "unpack",
]
__all__ += ops.__all__
