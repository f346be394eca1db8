"""A cache with transformers' interface over `KVCache`.

transformers counts the tokens that a cache has seen, padding among them, and masks the padding at
every step. Here a row holds its real tokens alone, one after another at their own positions: no
mask is left, and a step of decoding is one call whether rows were padded or not. `seen` is what
transformers counts, `real` says which of those were real.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ...checks import fail
from ...openelm import KVCache
from .configuration import OpenELMConfig

_STEP = 256  # tokens by which a cache on a GPU grows


class _Layer(CacheLayerMixin):
    """One layer's view of the cache that owns it."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: "OpenELMCache", index: int) -> None:
        self.owner, self.index = owner, index

    @property
    def is_initialized(self) -> bool:
        return self.owner.kv is not None

    @property
    def keys(self) -> Tensor | None:
        """[batch, kv_heads, tokens of the longest row, head_dim]."""
        return (
            None if self.owner.kv is None else self.owner.kv.filled(self.index)[0].transpose(1, 2)
        )

    @property
    def values(self) -> Tensor | None:
        return (
            None if self.owner.kv is None else self.owner.kv.filled(self.index)[1].transpose(1, 2)
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, n, _ = key_states.shape
        self.owner.make_room(batch, n, key_states.dtype, key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        return self.owner.update(key_states, value_states, self.index)

    def get_seq_length(self) -> int:
        return self.owner.seen

    def get_max_length(self) -> int:
        return self.owner.limit

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.seen + query_length, 0

    def offload(self) -> None:
        """Stays where it is."""

    def prefetch(self) -> None:
        """Is where it was."""


class OpenELMCache(Cache):
    """Keys and values that `OpenELMForCausalLM` keeps while it generates; it takes one by default.

    Each layer has its own number of heads; rows may differ in length. It is made at the first pass,
    and grows as far as the model has positions.

    Args:
        config: of the model.
        max_length: room for so many tokens at once; None for as many as come. On a CPU room costs
            nothing until tokens are written there.

    Attributes:
        kv: the KVCache; None before the first pass.
        seen: the tokens of each row so far, padding among them.
        real: bool [batch, seen], False where a row was padded; None if nothing was.

    Raises:
        TypeError: config is another one.

    Example:
        >>> cache = OpenELMCache(model.config)
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([[1, 2, 3]]), cache=cache)
        >>> cache.get_seq_length()
        3
    """

    def __init__(self, config: OpenELMConfig, max_length: int | None = None) -> None:
        if not isinstance(config, OpenELMConfig):
            fail("config", "an OpenELMConfig of transformers", type(config).__name__, TypeError)
        self.shape, self.asked = config.shape, max_length
        self.limit = self.shape.rope_max_length
        if max_length is not None and not 1 <= max_length <= self.limit:
            fail("max_length", f"in [1, {self.limit}] (rope_max_length)", max_length)
        self.kv: KVCache | None = None
        self.seen = 0
        self.real: Tensor | None = None
        super().__init__(layers=[_Layer(self, i) for i in range(len(self.shape.num_kv_heads))])

    @property
    def batch_size(self) -> int:
        """Its rows; -1 before the first pass."""
        return -1 if self.kv is None else self.kv.batch

    @property
    def max_batch_size(self) -> int:
        """Its rows, as older interfaces call them."""
        return self.batch_size

    def make_room(self, batch: int, n: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """The cache with room for more tokens.

        Args:
            batch, dtype, device: of what is to be written.
            n: how many tokens more of each row.

        Returns:
            The KVCache.

        Raises:
            ValueError: it holds another batch, or the model has no positions for so many tokens.
        """
        held = 0 if self.kv is None else self.kv.length
        if held + n > self.limit:
            raise ValueError(
                f"the model has {self.limit} positions (rope_max_length), got {held} tokens in the "
                f"cache and {n} new ones"
            )
        if self.kv is None:
            self.kv = KVCache(self.shape, batch, self._room(n, device), dtype=dtype, device=device)
        elif self.kv.batch != batch:
            raise ValueError(f"the cache holds {self.kv.batch} rows, got {batch}")
        elif held + n > self.kv.max_length:
            self._copy(list(range(batch)), self._room(held + n, device))
        return self.kv

    def _room(self, n: int, device: torch.device) -> int:
        if torch.device(device).type == "cpu":  # addresses, not memory
            return self.limit if self.asked is None else max(n, self.asked)
        return min(self.limit, max(-(-n // _STEP) * _STEP, self.asked or 0))

    def _copy(self, rows: list[int], max_length: int | None = None) -> None:
        """Become a cache of these rows of the one that there is."""
        old = self.kv
        new = KVCache(
            self.shape, len(rows), max_length or old.max_length, dtype=old.dtype, device=old.device
        )
        index = torch.tensor(rows, device=old.device)
        for layer in range(len(self.layers)):
            filled = old.filled(layer)
            for buffer, values in zip((new.k[layer], new.v[layer]), filled, strict=True):
                buffer[:, : values.shape[1]] = values[index]
        held = old.rows
        new.advance([held[row] for row in rows])
        self.kv = new

    def note(self, n: int, real: Tensor | None = None) -> None:
        """Count tokens as seen, once they are written.

        Args:
            n: how many of each row, padding among them.
            real: bool [batch, n], which of them are real; None for all.
        """
        if real is not None or self.real is not None:
            batch, device = self.kv.batch, self.kv.device
            ones = torch.ones(batch, max(self.seen, n), dtype=torch.bool, device=device)
            before = ones[:, : self.seen] if self.real is None else self.real
            self.real = torch.cat((before, ones[:, :n] if real is None else real), dim=1)
        self.seen += n

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values; the last layer's are counted.

        Args:
            key_states, value_states: [batch, kv_heads, n, head_dim], keys rotated.
            layer_idx: which layer.
            args, kwargs: not used.

        Returns:
            All that the layer holds, in the same layout.

        Raises:
            ValueError: rows hold padding, or differ in length.
        """
        batch, _, n, _ = key_states.shape
        kv = self.make_room(batch, n, key_states.dtype, key_states.device)
        if kv.ragged or self.real is not None:
            raise ValueError(
                "the cache holds rows without their padding, which attn_implementation "
                "'elmkernels' alone reads: start with a new cache"
            )
        k, v = kv.append(layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2))
        if layer_idx == len(self.layers) - 1:
            kv.advance(n)
            self.note(n)
        return k.transpose(1, 2), v.transpose(1, 2)

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        if self.kv is not None:
            self.kv.reset()
        self.seen, self.real = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: -n forgets n tokens; a positive number keeps so many, as older
                versions of transformers say it.
        """
        kept = self.seen + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if self.kv is None or kept >= self.seen:
            return
        if kept < 0:
            fail("tokens_to_remove", f"at least {-self.seen} (tokens seen)", tokens_to_remove)
        if self.real is None:
            self.kv.truncate(kept)
        else:
            self.real = self.real[:, :kept]
            self.kv.truncate(self.real.sum(1).tolist())
            self.real = None if bool(self.real.all()) else self.real
        self.seen = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in another order, of which some may be taken more than once.

        Args:
            beam_idx: [batch], the row that each becomes.
        """
        rows = beam_idx.tolist()
        if self.kv is None or rows == list(range(self.kv.batch)):
            return
        if len(rows) != self.kv.batch:
            self.batch_select_indices(beam_idx)
            return
        kv, held = self.kv, self.kv.rows
        # Only rows that change are copied: in a search with beams most of them stay.
        moved = [(to, row) for to, row in enumerate(rows) if to != row]
        to, source = (torch.tensor(side, device=kv.device) for side in zip(*moved, strict=True))
        for layer in range(len(self.layers)):
            for values in kv.filled(layer):
                values[to] = values[source]
        kv.reset()
        kv.advance([held[row] for row in rows])
        if self.real is not None:
            self.real = self.real[beam_idx.to(self.real.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row so many times, one after another.

        Args:
            repeats: how many times.
        """
        if self.kv is not None:
            rows = torch.arange(self.kv.batch).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows.

        Args:
            indices: their numbers, or bool [batch].
        """
        if self.kv is None:
            return
        rows = torch.arange(self.kv.batch)[indices.to("cpu")].tolist()
        self._copy(rows)
        if self.real is not None:
            self.real = self.real[torch.tensor(rows, device=self.real.device)]

    def __repr__(self) -> str:
        held = None if self.kv is None else self.kv.rows
        return f"OpenELMCache(seen={self.seen}, rows={held}, max_length={self.limit})"
