"""The least work of a pass: operations of its matrix products, bytes that a token must read."""

import torch

from .config import OpenELMConfig


def matmul_operations(config: OpenELMConfig, length: int, kept: int, training: bool) -> int:
    """Floating-point operations of the matrix products of one pass over [1, length] tokens, with
    the logits of `kept` positions; a training step makes each product three times, and five more
    for the two of attention.
    """
    shapes = config.parameter_shapes()
    layers = sum(s[0] * s[1] for n, s in shapes.items() if n.startswith("layers.") and len(s) == 2)
    head = config.vocab_size * config.model_dim
    products = 2 * (length * layers + kept * head)
    pairs = length * (length + 1) // 2
    attention = sum(4 * heads * config.head_dim * pairs for heads in config.num_query_heads)
    return 3 * products + attention * 7 // 2 if training else products + attention


def token_bytes(config: OpenELMConfig, dtype: torch.dtype, past: float) -> float:
    """Bytes that one new token must read: every weight once (of an embedding that is no output
    projection, one row) and the keys and values of `past` tokens.
    """
    count = config.num_parameters
    if not config.share_input_output_layers:
        count -= (config.vocab_size - 1) * config.model_dim
    cached = 2 * config.head_dim * sum(config.num_kv_heads)
    return (count + cached * past) * dtype.itemsize
