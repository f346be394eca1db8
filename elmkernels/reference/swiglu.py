"""y = round(silu(gate)) * up, where gate_up = [gate | up] is the output of one projection."""

from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2n] -> [..., n]; silu is rounded to the input's dtype before the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
