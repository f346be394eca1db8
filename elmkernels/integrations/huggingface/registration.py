"""What transformers knows by the name "openelm"."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from .configuration import OpenELMConfig
from .modeling import OpenELMForCausalLM


def register() -> None:
    """Register the classes; again is no error. OpenELM's tokenizer is Llama's."""
    AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
    AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
    AutoTokenizer.register(OpenELMConfig, LlamaTokenizer, exist_ok=True)
