"""Keys and values of the tokens already seen, in one preallocated pair of buffers a layer.

Keys are stored normalised and rotated: a token's position never changes, so nothing is ever
recomputed or moved. Every sequence of a batch has the same `length`; ragged batches are padded on
the left. A forward pass writes at [length, length + n) in every layer and then advances once, so a
pass that fails half way leaves the cache as it was.
"""

import torch
from torch import Tensor

from .config import OpenELMConfig


class KVCache:
    """Per layer i, `k[i]` and `v[i]` are [batch, max_length, kv_heads_i, head_dim]."""

    def __init__(
        self,
        config: OpenELMConfig,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch and max_length must be positive, got {batch} and {max_length}")
        if max_length > config.rope_max_length:
            raise ValueError(
                f"max_length must be at most rope_max_length {config.rope_max_length}, "
                f"got {max_length}"
            )
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        shapes = [(batch, max_length, heads, config.head_dim) for heads in config.num_kv_heads]
        # zeros: padding that is multiplied by an attention weight of 0 must not be NaN.
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    @property
    def dtype(self) -> torch.dtype:
        return self.k[0].dtype

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))

    def check_room(self, n: int) -> None:
        """Raise where n more tokens don't fit."""
        if self.length + n > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens (max_length): {self.length} written, "
                f"{n} more asked for"
            )

    def append(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [batch, n, kv_heads, head_dim] after the tokens written so far; return
        views of all the layer's keys and values, [batch, length + n, kv_heads, head_dim].
        """
        n = k.shape[1]
        self.check_room(n)
        for name, new, buffer in (("k", k, self.k[layer_index]), ("v", v, self.v[layer_index])):
            expected = (self.batch, n, *buffer.shape[2:])
            if tuple(new.shape) != expected or new.dtype != buffer.dtype:
                raise ValueError(
                    f"{name} of layer {layer_index} must be {list(expected)} {buffer.dtype}, "
                    f"got {list(new.shape)} {new.dtype}"
                )
            if new.requires_grad:
                raise RuntimeError(
                    "a cache holds no gradients: call the model under torch.inference_mode() or "
                    "torch.no_grad(), or without a cache"
                )
            buffer[:, self.length : self.length + n] = new
        return self.filled(layer_index, n)

    def filled(self, layer_index: int, n: int = 0) -> tuple[Tensor, Tensor]:
        """Views of a layer's first length + n keys and values."""
        end = self.length + n
        return self.k[layer_index][:, :end], self.v[layer_index][:, :end]

    def advance(self, n: int) -> None:
        """Count n tokens as written, once every layer has them."""
        self.check_room(n)
        self.length += n

    def truncate(self, length: int) -> None:
        """Forget every token from index `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie in [0, {self.length}], got {length}")
        self.length = length

    def reset(self) -> None:
        self.length = 0
