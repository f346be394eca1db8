"""Models of other families' shapes, from transformers: what OpenELM's paper compares its speed
with (OLMo), and what is run most (Llama).

Random weights: speed doesn't depend on them. OLMo's norms have no weights and its heads are not
shared; both have a gated feed-forward. transformers is imported late and is no dependency.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...generation.sampling import argmax
from ..benchmark import COMPILED, EAGER
from ..runners import Run, Runner, Task

OLMO, LLAMA = "OLMo-1.2B", "Llama-1B"
# {a shape's name: (transformers' family, its configuration)}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    OLMO: (
        "Olmo",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,  # its 2048 leave no room after a prompt of 2048
            "tie_word_embeddings": True,
        },
    ),
    LLAMA: (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
}
_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def missing() -> str | None:
    """Why there can be no such model here, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install transformers)"
    return None


def build(name: str, dtype: torch.dtype, device: torch.device, tiny: bool = False) -> Any:
    """A model of a shape of SHAPES with random weights; tiny: of its family, but of the least
    size. Raises ImportError without transformers.
    """
    if why := missing():
        raise ImportError(why)
    import transformers

    family, shape = SHAPES[name]
    config = getattr(transformers, f"{family}Config")(
        **(shape | _TINY if tiny else shape), pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.to(dtype).eval()


class PeerRunner(Runner):
    """Greedy tokens by the model's own forward and transformers' static cache; options: those of
    `torch.compile`, None for eager.
    """

    def __init__(self, name: str, model: Any, options: dict[str, Any] | None) -> None:
        self.name, self.model, self.options = name, model, options
        self.kind, self.facts = EAGER if options is None else COMPILED, {}
        config, weight = model.config, model.get_input_embeddings().weight
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        shared = config.hidden_size // config.num_attention_heads
        layer_bytes = 2 * shared * config.num_key_value_heads * weight.itemsize
        # transformers 5.24 gave the argument another name, and warns of the old one.
        taken = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in taken else "past_key_values"
        self.cache_token_bytes = config.num_hidden_layers * layer_bytes

    def run(self, task: Task) -> Run:
        """The pass over a task's prompt, or the decoding after it."""
        from transformers import StaticCache

        length, steps = task.prompts.shape[1], task.steps
        prompts = task.prompts % self.model.config.vocab_size
        cache = StaticCache(config=self.model.config, max_cache_len=task.length + 1)
        places, call = torch.arange(length), self._compiled()

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            rewind(cache, 0)
            return self._logits(call, prompts, cache, places).argmax(-1)[:, None].tolist()

        first = self._logits(self.model, prompts, cache, places).argmax(-1)
        if not steps:
            return prefill
        start = torch.tensor([length], device=prompts.device)

        @torch.inference_mode()
        def decode() -> list[list[int]]:
            rewind(cache, length)
            at, chosen = start.clone(), [first]
            for _ in range(steps):
                logits = self._logits(call, chosen[-1][:, None], cache, at)
                chosen.append(argmax(logits))
                at += 1
            return torch.stack(chosen, 1).tolist()

        return decode

    def _compiled(self) -> Callable:
        if self.options is None:
            return self.model
        return torch.compile(self.model, **self.options)

    @torch.inference_mode()
    def _logits(self, call: Callable, ids: Tensor, cache: Any, at: Tensor) -> Tensor:
        at = at.to(ids.device)[None].expand(ids.shape)
        if self.options is not None:
            torch.compiler.cudagraph_mark_step_begin()
        out = call(
            input_ids=ids,
            position_ids=at,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
        )
        return out.logits[:, -1].clone()


def rewind(cache: Any, length: int) -> None:
    """Make a static cache go on after `length` tokens: what lies beyond is masked. Raises
    RuntimeError for a transformers whose cache doesn't count its tokens in a tensor.
    """
    for layer in cache.layers:
        counted = getattr(layer, "cumulative_length", None)
        if not isinstance(counted, Tensor):
            raise RuntimeError("transformers is too old: its static cache can't be rewound")
        counted.fill_(length)
