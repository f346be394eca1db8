"""OpenELM models: configuration, model, cache, checkpoints, tokenizers and GGUF files.

What acts on models lives in other rooms; its usual names are here too, found at the first use:
`accelerate` and `restore` (acceleration), `generate`, `stream`, `greedy`, `Session` (generation),
`quantize`, `pack` and `unpack` (compression).
"""

from importlib import import_module
from typing import Any

from . import gguf
from .cache import KVCache
from .config import OpenELMConfig
from .loss import LossHead, next_token_loss, next_tokens
from .model import OpenELM
from .tokenizer import TextStream, Tokenizer

_ELSEWHERE = {
    "Plan": "acceleration.projections",
    "Report": "acceleration.report",
    "Row": "generation.row",
    "Session": "generation.session",
    "Stream": "generation.streaming",
    "accelerate": "acceleration.swap",
    "generate": "generation.session",
    "greedy": "generation.step",
    "next_logits": "generation.step",
    "pack": "compression.packing",
    "quantize": "compression.quantization",
    "restore": "acceleration.swap",
    "self_draft": "generation.drafts",
    "decoder_weights_of": "acceleration.decoder_weights",
    "stream": "generation.session",
    "unpack": "compression.packing",
}

__all__ = [
    "KVCache",
    "LossHead",
    "OpenELM",
    "OpenELMConfig",
    "TextStream",
    "Tokenizer",
    "gguf",
    "next_token_loss",
    "next_tokens",
    *_ELSEWHERE,  # pyright: ignore[reportUnsupportedDunderAll]
]


def __getattr__(name: str) -> Any:
    room = _ELSEWHERE.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"elmkernels.{room}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ELSEWHERE})
