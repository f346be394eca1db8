"""What a weight from a file must be before a kernel sees it: read to its last index, once."""

import torch
from torch import Tensor

from ..checks import fail
from .formats import Affine, Packed12, Weight, form_of
from .packed12 import check_packed12


def check_stored(name: str, weight: Weight) -> None:
    """Raise ValueError or TypeError unless the tensors of a weight from outside (a file, a
    state_dict) fit each other, every index in them points inside of it, and scales are finite.
    """
    form_of(weight).check(name)
    if isinstance(weight, Packed12):
        check_packed12(weight)
        _ascending(f"{name}.escape_columns", weight.escape_starts, weight.escape_columns)
    elif isinstance(weight, Affine):
        for part, x in (("scales", weight.scales), ("biases", weight.biases)):
            if not x.is_meta and x.numel() and not all(bool(v.isfinite()) for v in x.aminmax()):
                fail(f"{name}.{part}", "finite", "inf or nan")


def _ascending(name: str, starts: Tensor, columns: Tensor) -> None:
    """Within each row columns ascend: kernels walk a row once, and write at the next one."""
    if columns.is_meta or columns.numel() < 2:
        return
    rises = columns[1:] > columns[:-1]
    first = starts[1:-1].long()  # the place of each later row's first
    rises[first[(first > 0) & (first < columns.numel())] - 1] = True
    if not bool(rises.all()):
        at = int(torch.argmin(rises.int()))
        fail(name, "ascending within each row", f"{int(columns[at])} before {int(columns[at + 1])}")
