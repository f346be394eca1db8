"""OpenELM models: configuration, reference model, checkpoints, cache and decoding."""

from .cache import KVCache
from .config import OpenELMConfig
from .generate import greedy
from .model import OpenELM, next_token_loss
from .pack import pack, unpack
from .quantize import quantize
from .swap import Report, accelerate, restore

__all__ = [
    "KVCache",
    "OpenELM",
    "OpenELMConfig",
    "Report",
    "accelerate",
    "greedy",
    "next_token_loss",
    "pack",
    "quantize",
    "restore",
    "unpack",
]
