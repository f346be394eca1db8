"""OpenELM models: configuration, reference model, checkpoints, cache and generation."""

from ..acceleration.decoder_weights import next_logits, stack_of
from ..acceleration.swap import Report, accelerate, restore
from ..compression.packing import pack, unpack
from ..compression.quantization import quantize
from ..generation.session import Row, Session, Stream, generate, greedy, stream
from .cache import KVCache
from .config import OpenELMConfig
from .loss import LossHead, next_token_loss, next_tokens
from .model import OpenELM

__all__ = [
    "KVCache",
    "LossHead",
    "OpenELM",
    "OpenELMConfig",
    "Report",
    "Row",
    "Session",
    "Stream",
    "accelerate",
    "generate",
    "greedy",
    "next_logits",
    "next_token_loss",
    "next_tokens",
    "pack",
    "quantize",
    "restore",
    "stack_of",
    "stream",
    "unpack",
]
