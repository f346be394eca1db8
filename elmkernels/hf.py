"""Short for `elmkernels.integrations.huggingface`: importing it makes transformers know OpenELM."""

from .integrations.huggingface import (
    CHAT_TEMPLATE,
    OpenELMCache,
    OpenELMConfig,
    OpenELMForCausalLM,
    contrastive_search,
)

__all__ = [
    "CHAT_TEMPLATE", "OpenELMCache", "OpenELMConfig", "OpenELMForCausalLM", "contrastive_search",
]  # fmt: skip
