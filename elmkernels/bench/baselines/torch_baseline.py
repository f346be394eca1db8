"""OpenELM as one would write it for speed with torch's own operations: a baseline, not a reference.

F.rms_norm, one rotation with cos and sin gathered once for all layers, SDPA that shares key/value
heads, and a preallocated cache of rotated keys: what suits eager PyTorch, and `torch.compile`, for
which shapes and addresses are fixed. It rounds where those operations do, not where OpenELM does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...generation.cuda_graph import BUCKET
from ...generation.sampling import argmax
from ...openelm.model import OpenELM
from ...testing.cases.qk_norm_rope import rotate
from ..benchmark import COMPILED, EAGER, TORCH
from ..runners import Run, Runner, Task


class TorchBaseline(nn.Module):
    """The weights of a reference model, which are shared, with a cache of `max_length` tokens of
    `batch` rows. Raises ValueError for a model of another shape than the released ones.
    """

    def __init__(self, model: OpenELM, batch: int, max_length: int) -> None:
        super().__init__()
        config, weight = model.config, model.norm.weight
        if not (config.normalize_qk_projections and config.ffn_with_glu):
            raise ValueError("model must have QK norms and a gated feed-forward, got one without")
        model._place_rope_table(weight.device, max_length)
        self.model, self.head_dim = model, config.head_dim
        cos, sin = model.rope_table[:max_length].chunk(2, dim=-1)
        # Buffers: torch.compile takes their addresses as fixed.
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)
        slots = torch.arange(max_length, device=weight.device)
        self.register_buffer("slots", slots, persistent=False)
        for i, heads in enumerate(config.num_kv_heads):
            for which in "kv":
                cache = weight.new_zeros(batch, heads, max_length, config.head_dim)
                self.register_buffer(f"{which}_{i}", cache.detach(), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, seen: int | None = None) -> Tensor:
        """tokens [batch, length] at positions [length], which rise by one -> the logits of the
        last, [batch, vocab_size]. One token sees the cache's first `seen` slots, or by a mask all
        up to its own if `seen` is None; a prompt starts at 0 and sees itself alone.
        """
        model = self.model
        rotation = self.cos[positions, None], self.sin[positions, None]
        x = model.token_embeddings(tokens)
        for i, layer in enumerate(model.layers):
            x = x + self._attend(i, _norm(x, layer.attn_norm), positions, rotation, seen)
            gate, up = layer.ffn.proj_1(_norm(x, layer.ffn_norm)).chunk(2, dim=-1)
            x = x + layer.ffn.proj_2(F.silu(gate) * up)
        return model.project(_norm(x[:, -1], model.norm))

    def _attend(
        self,
        i: int,
        x: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        seen: int | None,
    ) -> Tensor:
        attn = self.model.layers[i].attn
        q_heads, kv_heads, (batch, length) = attn.q_heads, attn.kv_heads, x.shape[:2]
        heads = attn.qkv_proj(x).unflatten(-1, (q_heads + 2 * kv_heads, -1))
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=-2)
        q = rotate(_norm(q, attn.q_norm), *rotation).transpose(1, 2)
        k = rotate(_norm(k, attn.k_norm), *rotation).transpose(1, 2)
        v = v.transpose(1, 2)
        keys, values = getattr(self, f"k_{i}"), getattr(self, f"v_{i}")
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        if length > 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # A group's query heads as the rows of one matrix: no key is repeated in memory.
            q = q.reshape(batch, kv_heads, -1, self.head_dim)
            mask = None if seen is not None else (self.slots <= positions)[None, None, None]
            keys, values = keys[:, :, :seen], values[:, :, :seen]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            out = out.reshape(batch, q_heads, 1, self.head_dim)
        return attn.out_proj(out.transpose(1, 2).reshape(batch, length, -1))


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def room_for(task: Task, model: OpenELM) -> int:
    """The slots of a static cache: a whole number of what masks are aligned to, if it fits."""
    wanted = -(-(task.length + 1) // (BUCKET // 2)) * (BUCKET // 2)
    return min(wanted, model.config.rope_max_length)


class TorchBaselineRunner(Runner):
    """`TorchBaseline`; options: those of `torch.compile`, None for eager."""

    def __init__(self, model: OpenELM, options: dict[str, Any] | None = None) -> None:
        self.model, self.options = model, options
        self.name = TORCH if options is None else COMPILED
        self.kind, self.facts = EAGER if options is None else COMPILED, {}
        self.weight_bytes = sum(p.nbytes for p in model.parameters())

    def run(self, task: Task) -> Run:
        """Compiled for the shapes of this task alone, when it is called first."""
        prompts, length = task.prompts, task.prompts.shape[1]
        baseline = TorchBaseline(self.model, prompts.shape[0], room_for(task, self.model))
        positions = torch.arange(length, device=prompts.device)
        call = self._compiled(baseline)

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            return call(prompts, positions).argmax(-1)[:, None].tolist()

        if not task.steps:
            return prefill
        with torch.inference_mode():
            first = baseline(prompts, positions).argmax(-1)

        @torch.inference_mode()
        def decode() -> list[list[int]]:
            at, chosen = positions[-1:] + 1, [first]
            for i in range(task.steps):
                seen = None if self.options is not None else length + i + 1
                chosen.append(self._next(call, chosen[-1], at, seen))
                at += 1
            return torch.stack(chosen, 1).tolist()

        return decode

    def _next(self, call: Callable, tokens: Tensor, at: Tensor, seen: int | None) -> Tensor:
        if self.options is not None:
            torch.compiler.cudagraph_mark_step_begin()
        return argmax(call(tokens[:, None], at, seen))

    def _compiled(self, baseline: TorchBaseline) -> Callable:
        if self.options is None:
            return baseline
        return torch.compile(baseline, fullgraph=True, dynamic=False, **self.options)
