"""Reading on the host what a device makes step by step, without either waiting for the other."""

from typing import Any

import torch
from torch import Tensor


class Reader:
    """Rows of a tensor on their way to the host: the device doesn't wait for it, nor the host for
    more than the row that it reads.
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.apart = source.is_cuda
        self.host = torch.empty(
            source.shape, dtype=source.dtype, device="cpu", pin_memory=self.apart
        )
        self._side = torch.cuda.Stream(source.device) if self.apart else None
        self._arrived: dict[int, Any] = {}

    def send(self, row: int) -> None:
        """Row `row` as it is when what was launched before has run."""
        if self._side is None:
            self.host[row].copy_(self.source[row])
            return
        with torch.cuda.device(self.source.device):
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self.host[row].copy_(self.source[row], non_blocking=True)
                self._arrived[row] = self._side.record_event()

    def read(self, row: int) -> list[int]:
        arrived = self._arrived.pop(row, None)
        if arrived is not None:
            arrived.synchronize()
        return self.host[row].tolist()
