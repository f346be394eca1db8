"""Argument validation of the ops, in one form of message: `weight must be [1280], got [64]`."""

from numbers import Integral, Real
from typing import NoReturn, TypeGuard, cast

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

_NUMBERS = (int, Real, torch.SymInt, torch.SymFloat)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fail(name: str, expected: object, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise `kind` saying what argument `name` must be and what it was."""
    raise kind(f"{name} must be {expected}, got {got}")


NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def to_dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype, or a name of one ("bf16", "bfloat16"), as a torch.dtype; None stays None.
    Raises ValueError for anything else.
    """
    found = NAMES.get(value) if isinstance(value, str) else value
    if value is not None and found not in NAMES.values():
        fail(name, f"one of {', '.join(NAMES)}, or such a torch.dtype", repr(value))
    return found


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text that isn't empty, or its kind if it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _short(value: object) -> str:
    """A value as it is written, or its type if that is long."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _shape(shape: tuple | list) -> str:
    return str(list(shape))


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        fail(name, "a tensor", type(x).__name__, TypeError)


def floating(name: str, x: Tensor) -> None:
    """x is a tensor in a dtype that the kernels take."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype not in DTYPES:
        fail(name, "float32, bfloat16 or float16", x.dtype, TypeError)


def like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x has the dtype and device of another argument."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype != other.dtype:
        fail(name, f"{other.dtype} like {other_name}", x.dtype, TypeError)
    if x.device != other.device:
        fail(name, f"on {other.device} like {other_name}", x.device)


def shape(name: str, x: Tensor, expected: tuple) -> None:
    if x.shape != expected:
        fail(name, _shape(expected), _shape(x.shape))


def weight(name: str, w: Tensor, n: int, x_name: str, x: Tensor) -> None:
    """w is a norm's weight [n], on x's device, in x's dtype or in float32 (autocast)."""
    if not isinstance(w, Tensor):
        tensor(name, w)
    if w.dtype != x.dtype and w.dtype != torch.float32:
        fail(name, f"{x.dtype} like {x_name}, or torch.float32", w.dtype, TypeError)
    if w.dim() != 1 or w.shape[0] != n:
        fail(name, _shape((n,)), _shape(w.shape))
    if w.device != x.device:
        fail(name, f"on {x.device} like {x_name}", w.device)


_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def mask(name: str, x: Tensor, expected: tuple) -> None:
    """x is a tensor of truth values, or of integers that stand for them, of a shape."""
    tensor(name, x)
    if x.shape != expected or x.dtype not in _MASKS:
        fail(name, f"bool {_shape(expected)}", f"{x.dtype} {_shape(x.shape)}")


def integers(name: str, x: Tensor, device: torch.device) -> None:
    """x is an int64 tensor on a device (positions, slots)."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype != torch.int64:
        fail(name, "torch.int64", x.dtype, TypeError)
    if x.device != device:
        fail(name, f"on {device}", x.device)


def values_of(x: Tensor) -> Tensor:
    """The tensor that torch.func's transforms have wrapped, with their batches as dimensions: its
    numbers can be read; x itself if there are none."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def broadcastable(name: str, x: Tensor, expected: tuple) -> None:
    """x.shape broadcasts to `expected`."""
    if x.dim() > len(expected) or any(
        a not in (1, b) for a, b in zip(reversed(x.shape), reversed(expected), strict=False)
    ):
        fail(name, f"broadcastable to {_shape(expected)}", _shape(x.shape))


def positive(name: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt, Integral)) or value is True or value < 1:
        fail(name, "a positive integer", _short(value))


def number(
    name: str,
    value: object,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> None:
    """value is a number of Python's, or of one of its kind, and in a range if there is one."""
    if type(value) is not float and (not isinstance(value, _NUMBERS) or isinstance(value, bool)):
        fail(name, "a number", _short(value), TypeError)
    value = cast(float, value)
    if above is not None and not value > above:
        fail(name, f"above {above}", value)
    if least is not None and not value >= least:
        fail(name, f"at least {least}" if most is None else f"in [{least}, {most}]", value)
    if most is not None and not value <= most:
        fail(name, f"in [{least}, {most}]", value)


def truth(name: str, value: object) -> None:
    """value is True or False."""
    if value is not True and value is not False:
        fail(name, "True or False", _short(value), TypeError)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer: numpy's are, True and False aren't."""
    return isinstance(value, int | Integral) and not isinstance(value, bool)


def integer(name: str, value: object, least: int) -> int:
    """A value as Python's int, if it is an integer of at least `least`."""
    if not is_integer(value) or value < least:
        fail(name, "a positive integer" if least == 1 else f"at least {least}", repr(value))
    return int(value)


def within(name: str, x: Tensor, limit: int, what: str) -> None:
    """Every element of x lies in [0, limit). Reads the data: for CPU tensors, outside tracing."""
    if x.numel():
        low, high = (int(v) for v in torch.aminmax(values_of(x)))
        if low < 0 or high >= limit:
            fail(name, f"in [0, {limit}) ({what})", low if low < 0 else high)


def boundaries(name: str, x: Tensor, total: int) -> None:
    """x [documents + 1] rises, maybe not everywhere, from 0 to total. Reads the data, like
    `within`."""
    x = values_of(x)
    expected, (first, last) = f"rising from 0 to {total}", (int(x[0]), int(x[-1]))
    if (first, last) != (0, total):
        fail(name, expected, f"{first} to {last}")
    falls = x[1:] < x[:-1]  # a difference could wrap
    if bool(falls.any()):
        at = int(falls.int().argmax())
        fail(name, expected, f"{int(x[at])} before {int(x[at + 1])}")


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself when its last dimension has stride 1, as every hot path has; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
