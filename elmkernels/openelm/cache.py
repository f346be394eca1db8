"""Keys and values of the tokens already seen, in one buffer for all layers.

Layer-wise scaling gives each layer its own number of key/value heads, so each has its own share of
the buffer (`formats.Arena`): room for the widest layer everywhere would waste a quarter to a third.

Keys are stored normalized and rotated: a token's position never changes, so nothing is ever
recomputed or moved. Nor is anything copied to grow: on a CPU the buffer is reserved address space,
whose pages the system hands out, zeroed, as tokens are written to them. Memory follows the tokens
and `max_length` may as well be the model's limit. Elsewhere the buffer is allocated whole.

The rows of a batch may differ in length: `lengths`, beside `length`, the longest. A forward pass
writes its n tokens of row b at [lengths[b], lengths[b] + n) in every layer and then counts them, or
only some of them, in one step: a pass that fails or is interrupted leaves the cache as it was.
"""

import contextlib
import mmap
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..checks import fail, is_integer
from ..weights.formats import Arena
from .config import OpenELMConfig

_ALIGNMENT = 64  # elements between the starts of blocks: whole cache lines in any dtype


class KVCache:
    """Keys and values of the tokens that each row of a batch has seen.

    Args:
        config: of the model.
        batch: how many rows.
        max_length: the most tokens of a row; None for the model's rope_max_length.
        dtype: floating, that of the model's keys; None for torch's default until the first keys
            come, then theirs.
        device: None for torch's default.

    Attributes:
        follows: whether it still takes the dtype of the first keys (see `take_dtype`): as long as
            no dtype was given.
        k, v: of layer i, k[i] and v[i] [batch, max_length, kv_heads_i, head_dim]: views of arena.
        arena: all of them in one buffer, which `ops.decode_step` takes.

    Raises:
        TypeError, ValueError: a size or the dtype is out of its range.
        RuntimeError: the device isn't here.
        MemoryError: not even the addresses are to be had, or the GPU's memory doesn't suffice.

    Example:
        >>> cache = KVCache(config, batch=1, max_length=16, dtype=torch.bfloat16)
        >>> with torch.inference_mode():
        ...     logits = model(torch.tensor([[1, 2, 3]]), cache=cache)
        >>> cache.length
        3
    """

    def __init__(
        self,
        config: OpenELMConfig,
        batch: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        max_length = config.rope_max_length if max_length is None else max_length
        for name, size in (("batch", batch), ("max_length", max_length)):
            if not is_integer(size):
                fail(name, "an integer", repr(size), TypeError)
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch and max_length must be positive, got {batch} and {max_length}")
        batch, max_length = int(batch), int(max_length)
        if max_length > config.rope_max_length:
            raise ValueError(
                f"max_length must be at most rope_max_length {config.rope_max_length}, "
                f"got {max_length}"
            )
        self.follows = dtype is None
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        device = torch.get_default_device() if device is None else torch.device(device)
        self.batch, self.max_length = batch, max_length
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        # What every row holds, or each of them where they differ: one attribute, so that no
        # interruption can find rows that were counted and rows that were not.
        self._filled: int | tuple[int, ...] = 0
        self._allocate(dtype, device)

    def take_dtype(self, dtype: torch.dtype) -> None:
        """Change to the dtype of the keys that come, if it follows them and holds no token.

        Args:
            dtype: of the keys and values that a model is about to write.
        """
        before, device = self.dtype, self.device
        if self.follows and not self.length and dtype != before:
            del self.arena, self.k, self.v  # a GPU may have no room for both
            try:
                self._allocate(dtype, device)
            except MemoryError:
                self._allocate(before, device)
                raise

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        shapes = [(self.batch, heads, self.max_length, self.head_dim) for heads in self.kv_heads]
        offsets = torch.empty(len(shapes), 2, dtype=torch.int64, device="cpu")
        end = 0
        for layer, shape in enumerate(shapes):
            for which in (0, 1):
                offsets[layer, which] = end
                end += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
        devices.check_here(device)
        with torch.inference_mode(False):  # an inference tensor could not be written outside it
            try:
                data = _zeros(end, dtype, device)
            except torch.OutOfMemoryError as error:
                raise MemoryError(self._too_large(end * dtype.itemsize, dtype, device)) from error
            self.arena = Arena(data, offsets, self.batch, self.max_length, self.head_dim)
            self.k: list[Tensor] = []
            self.v: list[Tensor] = []
            for shape, starts in zip(shapes, offsets.tolist(), strict=True):
                for tensors, start in zip((self.k, self.v), starts, strict=True):
                    part = data[start : start + prod(shape)]
                    if device.type in ("cpu", "cuda"):
                        # A storage of its own: torch.compile copies what it takes for one tensor
                        # under many names, of which some are written.
                        part = torch.from_dlpack(part)
                    tensors.append(part.view(shape).transpose(1, 2))

    def _too_large(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> str:
        """What a cache needs, what is free, and what fits."""
        free, total = torch.cuda.mem_get_info(device)
        token = 2 * sum(self.kv_heads) * self.head_dim * dtype.itemsize  # of one row
        fits = []
        if length := min(self.max_length, free // (token * self.batch)):
            fits.append(f"a max_length of {length} for {self.batch} rows")
        if batch := free // (token * self.max_length):
            fits.append(f"{batch} rows of {self.max_length} tokens")
        return (
            f"a cache of {self.batch} rows of {self.max_length} tokens needs {nbytes} bytes "
            f"({nbytes / 2**30:.2f} GiB), {free} of {total} ({free / 2**30:.2f} GiB) are free on "
            f"{device}: at most {' or '.join(fits) or 'nothing of it'} would fit"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.k[0].dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.k[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved; on a CPU only those written take memory."""
        return self.arena.data.nbytes

    @property
    def length(self) -> int:
        """The tokens of the longest row."""
        filled = self._filled
        return filled if isinstance(filled, int) else max(filled)

    @property
    def lengths(self) -> Tensor:
        """The tokens of each row, int64 [batch] on the CPU: a copy, `advance` counts."""
        return torch.tensor(self.rows, dtype=torch.int64, device="cpu")

    @property
    def rows(self) -> list[int]:
        """`lengths` as a list."""
        filled = self._filled
        return [filled] * self.batch if isinstance(filled, int) else list(filled)

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length."""
        return not isinstance(self._filled, int)

    def check_room(self, n: int | Sequence[int] | Tensor) -> None:
        """Raise ValueError unless more tokens fit.

        Args:
            n: how many more, of every row, or one number a row.
        """
        if is_integer(n) and not self.ragged:
            if self._filled + n > self.max_length:
                self._refuse("", self._filled, n)
            return
        for row, (held, more) in enumerate(zip(self.rows, self._counts("n", n), strict=True)):
            if held + more > self.max_length:
                self._refuse(f"row {row} has ", held, more)

    def _refuse(self, row: str, held: int, more: int) -> None:
        raise ValueError(
            f"the cache holds {self.max_length} tokens (max_length): {row}{held} written, "
            f"{more} more asked for"
        )

    def _counts(self, name: str, n: int | Sequence[int] | Tensor) -> list[int]:
        """One number for each row, none negative."""
        counts = n.tolist() if isinstance(n, Tensor) else n
        counts = [counts] * self.batch if is_integer(counts) else list(counts)
        if len(counts) != self.batch or not all(is_integer(c) and c >= 0 for c in counts):
            raise ValueError(
                f"{name} must be a number of tokens, or one for each of {self.batch} rows, got {n}"
            )
        return [int(count) for count in counts]

    def append(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values after the tokens counted so far, without counting them.

        Args:
            layer_index: which layer.
            k, v: [batch, n, kv_heads, head_dim] in the cache's dtype, without gradients.

        Returns:
            Views of all the layer's keys and values, [batch, length + n, kv_heads, head_dim].

        Raises:
            ValueError: they don't fit, or have another shape or dtype.
            RuntimeError: they require a gradient.
        """
        n = k.shape[1]
        if not layer_index:  # the next ones find what it wrote
            self.take_dtype(k.dtype)
        self.check_room(n)
        slots = None
        if self.ragged:
            first = self.lengths.to(self.device)[:, None]
            slots = first + torch.arange(n, device=self.device)
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
            if slots is None:
                buffer[:, self.length : self.length + n] = new
            else:
                buffer.scatter_(1, slots[..., None, None].expand(new.shape), new)
        return self.filled(layer_index, n)

    def filled(self, layer_index: int, n: int = 0) -> tuple[Tensor, Tensor]:
        """What a layer holds.

        Args:
            layer_index: which layer.
            n: tokens more than are counted.

        Returns:
            Views of its first length + n keys and values.
        """
        end = self.length + n
        return self.k[layer_index][:, :end], self.v[layer_index][:, :end]

    def advance(self, n: int | Sequence[int] | Tensor) -> None:
        """Count tokens as written, once every layer has them. Raises ValueError if they don't fit.

        Args:
            n: how many, of every row, or one number a row.
        """
        self.check_room(n)
        if is_integer(n) and not self.ragged:
            self._filled += int(n)
        else:
            counts = self._counts("n", n)
            self._hold([held + more for held, more in zip(self.rows, counts, strict=True)])

    def truncate(self, length: int | Sequence[int] | Tensor) -> None:
        """Forget every token from an index on. Raises ValueError for one beyond what is held.

        Args:
            length: one number a row, or one for all, which shortens the rows that are longer.
        """
        if is_integer(length):
            if not 0 <= length <= self.length:
                raise ValueError(f"length must lie in [0, {self.length}], got {length}")
            self._hold([min(held, int(length)) for held in self.rows])
            return
        lengths = self._counts("length", length)
        for row, (held, kept) in enumerate(zip(self.rows, lengths, strict=True)):
            if kept > held:
                raise ValueError(f"length of row {row} must lie in [0, {held}], got {kept}")
        self._hold(lengths)

    def reset(self) -> None:
        """Forget all tokens."""
        self._filled = 0

    def _hold(self, rows: list[int]) -> None:
        self._filled = rows[0] if min(rows) == max(rows) else tuple(rows)

    def __getstate__(self) -> dict[str, Any]:
        # A copy needs what is written, not all that is reserved.
        state = {name: value for name, value in vars(self).items() if name not in ("k", "v")}
        state["arena"] = (self.dtype, self.device)
        filled = [self.filled(layer) for layer in range(len(self.kv_heads))]
        return state | {"filled": [(k.clone(), v.clone()) for k, v in filled]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        filled, arena = state.pop("filled"), state.pop("arena")
        vars(self).update(state)
        self._allocate(*arena)
        for buffers, written in zip(zip(self.k, self.v, strict=True), filled, strict=True):
            for buffer, values in zip(buffers, written, strict=True):
                buffer[:, : values.shape[1]] = values

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, max_length={self.max_length}, lengths={self.rows}, "
            f"{self.dtype}, {self.device})"
        )


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [count]. They are what padding reads that no one wrote: an attention weight of 0
    times NaN would be NaN.
    """
    nbytes = count * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(count, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        raise MemoryError(f"a cache of {nbytes} bytes can't be reserved: {error}") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page spans several heads of a long cache: the first token would commit it all.
        # A kernel built without huge pages refuses to be told that there should be none.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
