"""A pass of fixed shapes, and what replays it as a CUDA graph.

A step of decoding is hundreds of kernels of a few microseconds each, and the host can't launch
them as fast as a GPU runs them. So one pass is captured, with everything that changes between
passes in tensors of fixed addresses: the tokens and how many each row holds.

Shapes are fixed too: a pass attends to a *bucket*, the first 256, 512, 1024, ... slots of the
cache, and masks what is not filled. There is one capture for each bucket that is reached.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import COMPOSED, REFERENCE
from ..openelm.cache import KVCache
from ..openelm.layers import Context, Rotation
from ..openelm.model import OpenELM
from ..ops._attention_choice import attention_backend

BUCKET = 256  # slots of the smallest
# Widths of a prompt, which is padded to the next. Reasoned: up to 128 tokens reading the weights
# takes less time than launching the kernels one by one; longer ones are not captured.
WIDTHS = (16, 32, 64, 128)
WARM_UPS = 2  # compilers compile, libraries choose their kernels and workspaces


class Window:
    """The first `bucket` slots of a cache, as the layers see a cache of fixed shapes.

    lengths: int64 [batch] on the device, the tokens that each row holds: the next one's slot.
    """

    def __init__(self, cache: KVCache, bucket: int, lengths: Tensor) -> None:
        self.k = [k[:, :bucket] for k in cache.k]
        self.v = [v[:, :bucket] for v in cache.v]
        self.bucket, self.lengths = bucket, lengths

    def append(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [batch, n, kv_heads, head_dim] where each row's next tokens go."""
        index = self.lengths[:, None, None, None]
        if k.shape[1] > 1:
            index = index + torch.arange(k.shape[1], device=k.device)[:, None, None]
        for new, buffer in ((k, self.k[layer_index]), (v, self.v[layer_index])):
            buffer.scatter_(1, index.expand(new.shape), new)
        return self.filled(layer_index)

    def filled(self, layer_index: int, n: int = 0) -> tuple[Tensor, Tensor]:
        """All slots of the bucket, whatever is in them."""
        return self.k[layer_index], self.v[layer_index]


def step(model: OpenELM, tokens: Tensor, window: Window, counts: Tensor | None = None) -> Tensor:
    """tokens int64 [batch, n], after those that each row holds -> logits [batch, vocab_size] after
    the last of them, or after the first counts[b] (int64 [batch], at least 1; the rest is padding),
    without anything that the host must know. The window's lengths are the caller's to count.
    """
    n, device = tokens.shape[1], tokens.device
    at = window.lengths[:, None]
    if n > 1:
        at = at + torch.arange(n, device=device)
    backend = getattr(model.layers[0].attn, "attention_backend", REFERENCE)
    sight: dict[str, Any] = {"key_mask": None, "offsets": window.lengths}
    chosen = attention_backend(device.type, backend, "ragged", model.config.head_dim)
    if n == 1 and chosen in COMPOSED:
        # Torch's operations would copy the keys to blank what lies beyond; here it is finite.
        slots = torch.arange(window.bucket, device=device)
        sight = {"key_mask": slots <= at, "offsets": None}
    held: Any = window  # it is all that the layers ask of a cache
    context = Context(at, Rotation(model.rope_table), cache=held, slots=at, **sight)
    x = model.token_embeddings(tokens)
    for layer in model.layers:
        x = layer(x, context)
    if counts is not None:
        x = x.gather(1, (counts - 1)[:, None, None].expand(-1, 1, x.shape[2]))
    return model.logits(x[:, -1:])[:, -1]


def bucket_of(length: int, max_length: int) -> int:
    """The slots that a pass attends to after which a row has `length` tokens."""
    bucket = BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, max_length)


def width_of(length: int) -> int | None:
    """The width that a prompt of `length` tokens is padded to; None for one that isn't captured."""
    return next((width for width in WIDTHS if length <= width), None)


def capture(
    body: Callable[[], None],
    restore: Callable[[], None],
    device: torch.device,
    pool: Any = None,
) -> Callable[[], None]:
    """What replays a body that was run WARM_UPS times, and undone by restore each time. pool: of
    the memory of graphs that are never replayed at the same time.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                body()
                restore()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device in the meantime.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            body()
    return graph.replay
