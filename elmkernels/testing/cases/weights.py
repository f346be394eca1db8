"""Random weights in every form, for the ops that take one."""

import torch
from torch import Tensor

from ...weights.affine import quantize_weight
from ...weights.formats import Weight
from ...weights.packed12 import pack_weight
from .draw import ALL, Draw

# {form of a weight: (bits, group_size)}; a plain or a packed12 one has none.
FORMS: dict[str, tuple[int, int] | None] = {
    "plain": None,
    "affine8_64": (8, 64),
    "affine8_32": (8, 32),
    "affine4_64": (4, 64),
    "affine4_32": (4, 32),
    "packed12": None,
}


def dtypes_of(form: str) -> tuple[torch.dtype, ...]:
    """A packed12 weight is bfloat16, and so are the activations that it meets."""
    return (torch.bfloat16,) if form == "packed12" else ALL


def compressed(form: str, w: Tensor) -> Weight:
    """w [n, k] in one of the forms."""
    if scheme := FORMS[form]:
        return quantize_weight(w, *scheme)
    return pack_weight(w) if form == "packed12" else w


def weight(d: Draw, form: str, n: int, k: int, dtype: torch.dtype | None = None) -> Weight:
    """Random weights that keep the magnitude of their input; dtype: of an affine one's scales."""
    return compressed(form, d.normal(n, k, scale=max(1, k) ** -0.5, dtype=dtype))


def many_escapes(d: Draw, n: int, k: int) -> Tensor:
    """Weights over 60 powers of two, most of them without a code; a tenth are subnormal."""
    shifts = torch.randint(0, 60, (n, k), generator=d.generator, device=d.device)
    w = d.normal(n, k) * torch.exp2(-shifts.float()).to(d.dtype)
    return w.masked_fill(shifts < 6, 5e-39)
