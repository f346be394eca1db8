"""Varlen rows in the model: documents one after another in the rows of a batch."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..checks import boundaries, fail, integers
from ..reference.common import positions_of

__all__ = ["check_documents", "in_one_row", "positions_of"]


def in_one_row(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors [batch, length, ...] as [1, batch * length, ...], views where evenly spaced."""
    return (t.flatten(0, 1)[None] for t in tensors)


def check_documents(cu_seqlens: Tensor, input_ids: Tensor) -> None:
    """Raise TypeError or ValueError unless documents fill the rows of input_ids [batch, length] and
    none lies in two. Their numbers are read on a CPU only: a GPU would be waited for.
    """
    batch, length = input_ids.shape
    integers("cu_seqlens", cu_seqlens, input_ids.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        fail("cu_seqlens", "[documents + 1]", list(cu_seqlens.shape))
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    boundaries("cu_seqlens", cu_seqlens, batch * length)
    starts = torch.arange(batch) * length
    missing = starts[~torch.isin(starts, cu_seqlens)]
    if missing.numel():
        fail("cu_seqlens", f"a boundary at every row's start (each {length})",
             f"none at {int(missing[0])}")  # fmt: skip
