"""Decoding as CUDA graphs: one launch a step, the tokens chosen on the device.

A step of decoding is hundreds of kernels of a few microseconds each, and the host can't launch
them as fast as a GPU runs them. So one step is captured, with everything that changes between
steps in tensors of fixed addresses: the tokens, how many each row holds, and the tokens chosen so
far. Nothing is read back before all of them are wanted.

Shapes are fixed too: a step attends to a *bucket*, the first 256, 512, 768, ... slots of the cache,
and masks what is not filled. There is one capture for each bucket that is reached.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import COMPOSED, REFERENCE
from ..ops._attention_choice import attention_backend
from .cache import KVCache
from .layers import Context
from .model import OpenELM

BUCKET = (
    256  # slots: so many keys at most are read in vain, a multiple of what masks are aligned to
)
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
        """Write k and v [batch, 1, kv_heads, head_dim] where each row's next token goes."""
        index = self.lengths[:, None, None, None].expand(k.shape)
        for new, buffer in ((k, self.k[layer_index]), (v, self.v[layer_index])):
            buffer.scatter_(1, index, new)
        return self.filled(layer_index)

    def filled(self, layer_index: int, n: int = 0) -> tuple[Tensor, Tensor]:
        """All slots of the bucket, whatever is in them."""
        return self.k[layer_index], self.v[layer_index]


def step(model: OpenELM, tokens: Tensor, window: Window) -> Tensor:
    """tokens int64 [batch], each after those its row holds -> logits [batch, vocab_size], without
    anything that the host must know. The window's lengths are the caller's to count.
    """
    at = window.lengths[:, None]
    backend = getattr(model.layers[0].attn, "attention_backend", REFERENCE)
    sight: dict[str, Any] = {"key_mask": None, "offsets": window.lengths}
    kind, head_dim = tokens.device.type, model.config.head_dim
    if attention_backend(kind, backend, "ragged", head_dim) in COMPOSED:
        # Torch's operations would copy the keys to blank what lies beyond; here it is finite.
        slots = torch.arange(window.bucket, device=tokens.device)
        sight = {"key_mask": slots <= at, "offsets": None}
    context = Context(at, model.rope_table, cache=window, slots=at, **sight)
    x = model.token_embeddings(tokens[:, None])
    for layer in model.layers:
        x = layer(x, context)
    return model.logits(x)[:, -1]


def bucket_of(length: int, max_length: int) -> int:
    """The slots that a step with `length` tokens in the cache attends to, its own among them."""
    return min((length // BUCKET + 1) * BUCKET, max_length)


class GraphDecoder:
    """Greedy decoding of a batch of prompts of one length, one launch a step.

    captured: False runs the same step call by call, on any device. Raises RuntimeError where a
    step can't be captured, ValueError for tokens beyond max_length.
    """

    def __init__(
        self, model: OpenELM, batch: int, max_length: int, *, captured: bool = True
    ) -> None:
        device = model.norm.weight.device
        if captured and device.type != "cuda":
            raise RuntimeError(
                f"a captured step needs a CUDA device, the model is on {device}: "
                "captured=False runs the same step call by call, `generate` is faster there"
            )
        model._place_rope_table(device)
        self.model, self.captured = model, captured
        self.cache = KVCache(
            model.config, batch, max_length, dtype=model.activation_dtype, device=device
        )
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(batch, max_length + 1, dtype=torch.int64, device=device)
        self._replays: dict[int, Callable[[], None]] = {}

    @property
    def captures(self) -> list[int]:
        """The buckets whose step was captured."""
        return sorted(self._replays)

    @torch.inference_mode()
    def prompt(self, input_ids: Tensor) -> Tensor:
        """input_ids [batch, length] in place of what the cache held -> the first tokens after
        them, int64 [batch]."""
        self.cache.reset()
        logits = self.model(input_ids, cache=self.cache, logits_to_keep=1)[:, -1]
        self.rewind(self.cache.length, logits.argmax(-1))
        return self.tokens.clone()

    @torch.inference_mode()
    def rewind(self, length: int, tokens: Tensor) -> None:
        """Forget every token from index `length` on; `tokens` [batch] come next."""
        self.cache.truncate(length)
        self.lengths.fill_(length)
        self.tokens.copy_(tokens)

    @torch.inference_mode()
    def decode(self, steps: int) -> Tensor:
        """The next `steps` tokens of each row, int64 [batch, steps], after those chosen last."""
        start = self.cache.length
        self.cache.check_room(steps)
        for length in range(start, start + steps):
            self._step(bucket_of(length, self.cache.max_length))
        self.cache.advance(steps)
        return self.chosen[:, start + 1 : start + 1 + steps].clone()

    def _step(self, bucket: int) -> None:
        if not self.captured:
            self._body(Window(self.cache, bucket, self.lengths))
            return
        if bucket not in self._replays:
            self._replays[bucket] = self._capture(bucket)
        self._replays[bucket]()

    def _body(self, window: Window) -> None:
        """What is captured: a step, and its result where the next one finds it."""
        self.tokens.copy_(step(self.model, self.tokens, window).argmax(-1))
        self.lengths.add_(1)
        self.chosen.scatter_(1, self.lengths[:, None], self.tokens[:, None])

    def _capture(self, bucket: int) -> Callable[[], None]:
        state = self.tokens.clone(), self.lengths.clone()

        def restore() -> None:  # what a warm-up wrote to the cache the first replay writes again
            self.tokens.copy_(state[0])
            self.lengths.copy_(state[1])

        window = Window(self.cache, bucket, self.lengths)
        return capture(lambda: self._body(window), restore, self.tokens.device)


def capture(
    body: Callable[[], None], restore: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """What replays a body that was run WARM_UPS times, and undone by restore each time."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                body()
                restore()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
    return graph.replay
