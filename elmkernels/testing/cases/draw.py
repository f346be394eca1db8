"""What a case is, and where it draws its tensors from. The cases are in `cases`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...openelm.config import VARIANTS, OpenELMConfig

ALL = (torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
TABLE_LENGTH = 4096


@dataclass
class Draw:
    """Where a case takes its tensors from: one dtype, one device, one seeded stream."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, device=self.device)
        return (x * scale).to(dtype or self.dtype)

    def uniform(self, *shape: int, scale: float) -> Tensor:
        """Within +-scale: for magnitudes near the end of what a dtype holds."""
        x = torch.rand(*shape, generator=self.generator, device=self.device)
        return ((2 * x - 1) * scale).to(self.dtype)

    def weight(self, n: int, wide: bool = False) -> Tensor:
        """A norm's weight, around 1; `wide` is float32 whatever the case's dtype (autocast)."""
        dtype = torch.float32 if wide else self.dtype
        return (1 + self.normal(n, scale=0.3, dtype=torch.float32)).to(dtype).requires_grad_()

    def huge(self, *shape: int) -> Tensor:
        """Activations like those of OpenELM-3B, which float16 can't hold; there, near its end."""
        return self.uniform(*shape, scale=3e4 if self.dtype == torch.float16 else 3e5)

    def outliers(self, *shape: int) -> Tensor:
        """A few channels a thousand times larger than the rest, as trained models have."""
        x = self.normal(*shape)
        x[..., :: max(1, shape[-1] // 3)] *= 1000
        return x


Inputs = tuple[tuple, dict]


@dataclass(frozen=True)
class Case:
    """One input to an op: a recipe of which `make` draws the tensors.

    Attributes:
        op: the op's name.
        name: its own.
        build: `(Draw)` to the (args, kwargs) of the op.
        dtypes: those that it may be drawn in.
        unused: the numbers of the outputs that receive no gradient.
        cotangent: how the gradients that arrive are laid out: "contiguous", "broadcast" (stride 0,
            as sum() gives) or "strided".
        check: a smaller case whose parity stands for that of one too large to repeat in float64.

    Example:
        >>> CASES["swiglu"][0].op
        'swiglu'
    """

    op: str
    name: str
    build: Callable[[Draw], Inputs] = field(repr=False)
    dtypes: tuple[torch.dtype, ...] = ALL
    unused: tuple[int, ...] = ()
    cotangent: str = "contiguous"
    check: "Case | None" = None

    def __str__(self) -> str:
        return self.name


def make(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """The tensors of a case.

    Args:
        case: the recipe.
        dtype: of the floating tensors.
        device: where they are drawn.
        seed: of the generator.

    Returns:
        (args, kwargs) for the op's public signature; gradients are required wherever a model would.

    Example:
        >>> args, kwargs = make(CASES["swiglu"][0], torch.bfloat16)
        >>> y = elmkernels.swiglu(*args, **kwargs)
    """
    device = torch.device(device)
    return case.build(Draw(dtype, device, torch.Generator(device).manual_seed(seed)))


def grad(x: Tensor) -> Tensor:
    """x, as it lies in memory, as a leaf that requires a gradient."""
    return x.detach().requires_grad_()


def models() -> dict[str, OpenELMConfig]:
    """{"270M": config, ...} of the four models."""
    return {name.removeprefix("OpenELM-"): OpenELMConfig.from_name(name) for name in VARIANTS}


# Ways for [a, b, n] to lie in memory.
LAYOUTS: dict[str, Callable[[Draw, int, int, int], Tensor]] = {
    "row_slices": lambda d, a, b, n: d.normal(a, b, 2 * n + 3)[..., 1 : n + 1],
    "transposed": lambda d, a, b, n: d.normal(b, a, n).transpose(0, 1),
    "last_stride_2": lambda d, a, b, n: d.normal(a, b, 2 * n)[..., ::2],
    "channels_first": lambda d, a, b, n: d.normal(a, n, b).transpose(1, 2),
    "broadcast_rows": lambda d, a, b, n: d.normal(a, 1, n).expand(a, b, n),
    "every_other_row": lambda d, a, b, n: d.normal(a, 2 * b, n)[:, ::2],
}
