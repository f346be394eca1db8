"""OpenELM as Apple's code runs it, in plain eager PyTorch: the slow side of the paper's comparison.

The norms are the reference's, step by step. The cache grows by concatenation and holds keys before
their rotation, so that every step rotates all of them; keys and values are repeated for every query
head; attention takes a dense mask; every position of a prompt gets logits. The causal mask is made
once a pass at the size of its sequence, where Apple's code fills one of its largest context: that,
and whatever transformers adds around it, is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...generation.sampling import argmax
from ...openelm.model import OpenELM
from ...reference import rms_norm
from ...reference.qk_norm_rope import rotate
from ..benchmark import EAGER
from ..runners import Run, Runner, Task


class Naive(nn.Module):
    """The weights of a reference model, which are shared. Raises ValueError for a model of another
    shape than the released ones.
    """

    def __init__(self, model: OpenELM) -> None:
        super().__init__()
        config = model.config
        if not (config.normalize_qk_projections and config.ffn_with_glu):
            raise ValueError("model must have QK norms and a gated feed-forward, got one without")
        self.model = model

    def forward(self, tokens: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """tokens [batch, length] after those of the cache, which is given those of each layer ->
        logits [batch, length, vocab_size].
        """
        model, length = self.model, tokens.shape[1]
        past = cache[0][0].shape[2] if cache else 0
        model._place_rope_table(tokens.device, past + length)
        cos, sin = model.rope_table[: past + length].chunk(2, dim=-1)
        x = model.token_embeddings(tokens)
        lowest = torch.finfo(x.dtype).min
        mask = x.new_full((length, past + length), lowest).triu(past + 1)
        for i, layer in enumerate(model.layers):
            x = x + self._attend(i, _norm(x, layer.attn_norm), cache, (cos, sin), mask)
            gate, up = layer.ffn.proj_1(_norm(x, layer.ffn_norm)).chunk(2, dim=-1)
            x = x + layer.ffn.proj_2(F.silu(gate) * up)
        return model.project(_norm(x, model.norm))

    def _attend(
        self,
        i: int,
        x: Tensor,
        cache: list[tuple[Tensor, Tensor]],
        angles: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        attn = self.model.layers[i].attn
        q_heads, kv_heads, length = attn.q_heads, attn.kv_heads, x.shape[1]
        heads = attn.qkv_proj(x).unflatten(-1, (q_heads + 2 * kv_heads, -1)).transpose(1, 2)
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)
        q, k = _norm(q, attn.q_norm), _norm(k, attn.k_norm)
        if i < len(cache):
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache[i], (k, v), strict=True))
            cache[i] = k, v
        else:
            cache.append((k, v))
        cos, sin = angles
        q = rotate(q, cos[-length:], sin[-length:]).to(x.dtype)
        k = rotate(k, cos, sin).to(x.dtype)
        k, v = (t.repeat_interleave(q_heads // kv_heads, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attn.out_proj(out.transpose(1, 2).flatten(2))


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm(x, norm.weight, norm.eps)


class NaiveRunner(Runner):
    """The naive model's greedy tokens."""

    def __init__(self, name: str, model: OpenELM) -> None:
        self.name, self.kind, self.facts = name, EAGER, {}
        self.naive, self.weight_bytes = Naive(model), sum(p.nbytes for p in model.parameters())
        heads = sum(model.config.num_kv_heads)
        self.cache_token_bytes = 2 * model.config.head_dim * heads * model.norm.weight.itemsize

    def run(self, task: Task) -> Run:
        """The pass over a task's prompt, or the decoding after it."""
        prompts, naive = task.prompts, self.naive

        def first(cache: list[tuple[Tensor, Tensor]]) -> Tensor:
            return naive(prompts, cache)[:, -1].argmax(-1)

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            return first([])[:, None].tolist()

        if not task.steps:
            return prefill
        held: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            begun = first(held)

        @torch.inference_mode()
        def decode() -> list[list[int]]:
            cache, chosen = list(held), [begun]
            for _ in range(task.steps):
                chosen.append(argmax(naive(chosen[-1][:, None], cache)[:, -1]))
            return torch.stack(chosen, 1).tolist()

        return decode
