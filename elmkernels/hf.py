"""Short for `elmkernels.integrations.huggingface`: importing it makes transformers know OpenELM."""

from .integrations.huggingface import OpenELMCache, OpenELMConfig, OpenELMForCausalLM

__all__ = ["OpenELMCache", "OpenELMConfig", "OpenELMForCausalLM"]
