"""The next tokens of each sequence through a whole decoder: the plain loop over its layers.

    x = x + out_proj(attention(qk_norm_rope(qkv_proj(attn_norm(x)))))
    x = x + proj_2(swiglu(proj_1(ffn_norm(x))));  logits = head(norm(x))
    chosen = argmax(logits), where it is asked for

A token's keys and values are written at its position of its sequence; it sees those up to there.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..weights.formats import Arena, DecoderWeights
from .attention import attention
from .linear import dense, linear
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .swiglu import swiglu


def decode_step(
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    sequences: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """tokens, positions, sequences (None: 0, 1, ...) int64 [n] -> logits [n, vocab_size] in the
    arena's dtype; chosen int64 [n], which may be tokens, receives the likeliest of each row."""
    dtype, eps = arena.data.dtype, weights.eps
    product = partial(linear, activations=weights.activations)
    x = dense(weights.embedding, dtype)[tokens][:, None]
    place = positions[:, None]
    rows = slice(None) if sequences is None else sequences
    of = torch.arange(len(tokens), device=tokens.device) if sequences is None else sequences
    length = int(positions.max()) + 1 if positions.numel() else 0
    seen = torch.arange(length, device=tokens.device) <= place
    for i, layer in enumerate(weights.layers):
        q, k, v = qk_norm_rope(
            product(rms_norm(x, layer.attn_norm, eps), layer.qkv_proj),
            *(layer.q_norm, layer.k_norm, place, layer.q_heads, layer.kv_heads),
            *(weights.rope_table, eps),
        )
        k_cache, v_cache = arena.views(i, layer.kv_heads)
        k_cache[of, positions], v_cache[of, positions] = k[:, 0], v[:, 0]
        out = attention(q, k_cache[rows, :length], v_cache[rows, :length], seen)
        x = x + product(out.flatten(-2), layer.out_proj)
        y = product(rms_norm(x, layer.ffn_norm, eps), layer.proj_1)
        x = x + product(swiglu(y) if weights.gated else silu(y), layer.proj_2)
    logits = product(rms_norm(x, weights.norm, eps), weights.head)[:, 0]
    if chosen is not None and logits.numel():
        chosen.copy_(logits.argmax(-1))
    return logits
