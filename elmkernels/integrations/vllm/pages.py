"""Weights in large pages: a product of few rows reads all of them at every step, and looks up every
page on its way. Nothing here knows vLLM.
"""

import mmap

import torch
from torch import Tensor

_CHUNK = 64 << 20  # bytes that are asked for at once; those that nobody writes take no memory
_ALIGNED = 64


class LargePages:
    """Memory for tensors that stay, in pages of 2 MiB if the system has them."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._taken = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy; the tensor itself if the system knows no large pages.

        Args:
            tensor: on a CPU.
        """
        size = -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if not hasattr(mmap, "MADV_HUGEPAGE") or not size:
            return tensor
        if self._memory is None or self._taken + size > len(self._memory):
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory, self._taken = mmap.mmap(-1, max(_CHUNK, size), flags=private), 0
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without them: the pages are small
                pass
        found = torch.frombuffer(
            self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=self._taken
        )
        self._taken += size
        return found.view(tensor.shape).copy_(tensor)
