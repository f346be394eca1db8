"""The rotary table of a model, which grows by need: a configuration may allow more positions than
there is memory for.
"""

import torch
from torch import Tensor

from ..reference import rope_table
from .config import OpenELMConfig

ROWS = 8192  # as long as no sequence is longer


def placed(table: Tensor, config: OpenELMConfig, device: torch.device, length: int = 0) -> Tensor:
    """The table on a device with rows for at least `length` positions, up to rope_max_length:
    `table` itself if it is that already, or can grow; it is made on the CPU, for the same bits on
    every device.

    It stays the same object while it grows, as `DecoderWeights` hold it.
    """
    rows, most = table.shape[0], config.rope_max_length
    if table.device == device and rows and (rows == most or rows >= length):
        return table
    rows = max(rows, min(most, ROWS))
    while rows < min(length, most):
        rows = min(2 * rows, most)
    shape = rows, config.head_dim
    if device.type == "meta":  # arange there would import half of torch too
        return torch.empty(shape, dtype=torch.float32, device=device)
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward
        made = rope_table(*shape, float(config.rope_freq_constant), device="cpu").to(device)
        if table.device != device or not table.shape[0]:
            return made
        table.data = made
        return table
