"""Weights in 8 or 4 bits with a scale and a bias for every group of columns, bit for bit as MLX.

Per group of 32 or 64 weights of a row, in float32 (MLX's affine mode):

    edge = the one of min and max that is further from zero
    scale = (max - min) / (2^bits - 1), at least 1e-7; negative where edge is max
    q0 = round(edge / scale);  scale = edge / q0 and bias = edge where q0 is not 0, else bias = 0
    q = clamp(round((w - bias) / scale), 0, 2^bits - 1)

so that the weight of largest magnitude is exact. Scales and biases are kept in the weights' dtype.
"""

import numpy as np
import torch
from torch import Tensor

from .chunks import each_chunk
from .formats import BITS, GROUP_SIZES, Affine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(False)  # its threads have no such mode, and what it makes outlives this one
def quantize_weight(w: Tensor, bits: int = 4, group_size: int = 64) -> Affine:
    """w floating [n, k] -> its quantized form, on the same device.

    Raises ValueError for bits not in (8, 4), group_size not in (32, 64), k that is no multiple of
    group_size, a dtype other than float32, bfloat16 and float16, and weights that are not finite.
    """
    check_scheme(bits, group_size)
    if w.dim() != 2 or w.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"w must be [n, k] of {names}, got {list(w.shape)} {w.dtype}")
    n, k = w.shape
    if k % group_size:
        raise ValueError(f"k must be a multiple of group_size {group_size}, got {k}")
    q = np.empty((n, k * bits // 8), np.uint8)
    scales, biases = (torch.empty(n, k // group_size, dtype=w.dtype) for _ in range(2))

    def encode(rows: slice) -> None:
        values, scale, bias = _quantize_rows(_float32(w[rows]), bits, group_size)
        if bits == 4:
            pairs = values.view(np.uint16)  # a + 256 b becomes a + 16 b in its low byte
            values = (pairs | pairs >> 4).astype(np.uint8)
        q[rows] = values
        scales[rows], biases[rows] = torch.from_numpy(scale), torch.from_numpy(bias)

    each_chunk(encode, n, k)
    words = torch.from_numpy(q).view(torch.uint32)
    device = w.device
    return Affine(words.to(device), scales.to(device), biases.to(device), bits, group_size)


def _float32(w: Tensor) -> np.ndarray:
    w = w.detach().to("cpu")
    if w.dtype != torch.bfloat16:
        return w.numpy().astype(np.float32)
    wide = w.view(torch.int16).numpy().astype(np.int32)
    return np.left_shift(wide, 16, out=wide).view(np.float32)


def _quantize_rows(
    w: np.ndarray, bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w float32 [n, k], which is written to -> q uint8 [n, k]; scale and bias float32."""
    groups = w.reshape(len(w), -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise ValueError("weights must be finite to be quantized, got inf or nan")
    top = np.float32(2**bits - 1)
    below = np.abs(low) > np.abs(high)
    # The range of huge weights may overflow, and MLX goes on with that.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scale = np.maximum((high - low) / top, np.float32(1e-7))
        scale = np.where(below, scale, -scale)
        edge = np.where(below, low, high)
        q0 = np.rint(edge / scale)
        scale = np.where(q0 != 0, edge / q0, scale)
    bias = np.where(q0 != 0, edge, np.float32(0))
    groups -= bias[..., None]
    groups /= scale[..., None]
    np.rint(groups, out=groups)
    np.clip(groups, 0, top, out=groups)
    return w.astype(np.uint8), scale, bias


def check_scheme(bits: int, group_size: int) -> None:
    """Raise ValueError for bits and group sizes that `formats.Affine` doesn't have."""
    for name, value, known in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
        if isinstance(value, bool) or value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(str, known))}, got {value!r}")
