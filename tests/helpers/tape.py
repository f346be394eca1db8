"""What a CUDA graph does, without a GPU: operations recorded once and run again on their tensors.

Python is not run again, so what it decided stays as it was; results go where they were the first
time; and reading a tensor on the host is an error, as it is in a capture.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"the host reads a tensor: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            returns = func._schema.returns
            if returns and all(r.alias_info and not r.alias_info.is_write for r in returns):
                continue  # a view, of what is run again
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # A prepacked copy of a weight has no address, and none is made on a GPU.
                placed = isinstance(old, torch.Tensor) and old.layout == torch.strided
                if placed and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(body: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    """As `graph.capture`, with a warm-up and without running what is recorded for good."""
    body()
    restore()
    tape = Tape()
    with tape:
        body()
    restore()
    return tape.replay
