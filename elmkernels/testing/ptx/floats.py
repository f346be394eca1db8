"""Numbers as a GPU rounds them, on numpy arrays: conversions, fused products, approximations.

A sum that a wider type can't hold is first rounded to odd there, which keeps what a second
rounding has to know: which side of every narrower number, and of every middle between two, it is.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
NAN16 = {"f16": 0x7FFF, "bf16": 0x7FFF}
TINY32 = float(np.finfo(np.float32).tiny)
LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F}


def odd(total: Array, error: Array) -> Array:
    """`total + error`, of which total is the rounded sum, rounded to odd."""
    whole = np.int64 if total.dtype == np.float64 else np.int32
    bits = total.view(whole)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total) & np.isfinite(error)
    step = np.where((error > 0) == (total > 0), 1, -1).astype(whole)
    # From zero a step of either sign leads to the smallest number of the error's sign.
    least = np.where(error > 0, 1, np.iinfo(whole).min + 1).astype(whole)
    moved = np.where(total == 0, least, bits + step)
    return np.where(inexact, moved, bits).view(total.dtype)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    total = a + b
    back = total - a
    return odd(total, (a - (total - back)) + (b - back))


def odd32(wide: Array) -> Array:
    """float64 to float32, rounded to odd."""
    near = wide.astype(np.float32)
    largest = np.float32(np.finfo(np.float32).max)
    near = np.where(np.isinf(near) & np.isfinite(wide), np.copysign(largest, near), near)
    with np.errstate(invalid="ignore"):
        return odd(near, (wide - near.astype(np.float64)).astype(np.float32)) if near.size else near


def round32(wide: Array, mode: str = "rn") -> Array:
    """float64, exact or rounded to odd, to float32 by "rn", "rz", "rm" or "rp"."""
    near = wide.astype(np.float32)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    below = np.nextafter(near, np.float32(-np.inf))
    above = np.nextafter(near, np.float32(np.inf))
    if mode == "rm":
        return np.where(back > wide, below, near)
    if mode == "rp":
        return np.where(back < wide, above, near)
    far = np.abs(back) > np.abs(wide)
    return np.where(far, np.where(near > 0, below, above), near)


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a b + c of float32, rounded once."""
    product = a.astype(np.float64) * b  # 48 bits: exact
    wide = c.astype(np.float64)
    if mode != "rn":
        return round32(odd_sum(product, wide), mode)
    total = product + wide
    near = total.astype(np.float32)
    # Two roundings differ from one only in the middle between two numbers, or below the normal
    # ones, where the middle is elsewhere. Zeros are exact.
    middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    twice = middle | ((np.abs(total) < 2 * TINY32) & (total != 0))
    if twice.any():
        at = np.flatnonzero(twice)
        parts = (np.broadcast_to(x, total.shape)[at] for x in (product, wide))
        once = odd_sum(*parts).astype(np.float32)
        near[at] = np.where(once == 0, near[at], once)
    return near


def to_f16(x: Array, mode: str = "rn") -> Array:
    """float32 to the bits of float16."""
    near = x.astype(np.float16)
    bits = near.view(np.uint16)
    if mode == "rz":
        far = np.abs(near.astype(np.float32)) > np.abs(x)
        bits = bits - far.astype(np.uint16)
    elif mode != "rn":
        raise KeyError(mode)
    return np.where(np.isnan(x), np.uint16(NAN16["f16"]), bits)


def to_bf16(x: Array, mode: str = "rn") -> Array:
    """float32 to the bits of bfloat16."""
    bits = x.view(np.uint32)
    if mode == "rn":
        near = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> 16
    elif mode == "rz":
        near = bits >> 16
    elif mode == "rna":
        near = (bits + np.uint32(0x8000)) >> 16
    else:
        raise KeyError(mode)
    return np.where(np.isnan(x), NAN16["bf16"], near).astype(np.uint16)


def to_tf32(x: Array, mode: str = "rna") -> Array:
    """float32 to float32 with 10 bits of mantissa."""
    bits = x.view(np.uint32)
    if mode == "rna":
        near = bits + np.uint32(0x1000)
    elif mode == "rn":
        near = bits + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
    elif mode == "rz":
        near = bits
    else:
        raise KeyError(mode)
    near = (near & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), near, x)


def from_bf16(bits: Array) -> Array:
    """The bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f16(bits: Array) -> Array:
    """The bits of float16 to float32."""
    return bits.view(np.float16).astype(np.float32)


WIDEN: dict[str, Callable[[Array], Array]] = {"f16": from_f16, "bf16": from_bf16}
NARROW: dict[str, Callable[..., Array]] = {"f16": to_f16, "bf16": to_bf16}


def half(name: str, type: str, *args: Array) -> Array:
    """add, sub, mul or fma of numbers of 16 bits (or two of them in 32), rounded once."""
    if type.endswith("x2"):
        pairs = [np.ascontiguousarray(a).view(np.uint16) for a in np.broadcast_arrays(*args)]
        return half(name, type[:-2], *pairs).view(np.uint32)
    a, b, *c = (WIDEN[type](np.asarray(x)).astype(np.float64) for x in args)
    if name in ("add", "sub"):
        exact = odd_sum(a, b if name == "add" else -b)
    elif name == "mul":
        exact = a * b
    else:
        total = a * b + c[0]
        exact = odd_sum(a * b, c[0])
        exact = np.where(exact == 0, total, exact)
    return NARROW[type](odd32(exact))


def flush(x: Array) -> Array:
    """float32 numbers below the normal ones to zeros of their sign."""
    small = np.abs(x) < np.float32(TINY32)
    return np.where(small, np.copysign(np.float32(0), x), x)


def saturate(x: Array) -> Array:
    """float32 to [0, 1]; NaN to 0."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def to_integer(x: Array, mode: str, dtype: np.dtype) -> Array:
    """A float to an integer by "rni", "rzi", "rmi" or "rpi": saturated, NaN to 0."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    info = np.iinfo(dtype)
    wide = whole(x.astype(np.float64))
    inside = (wide > float(info.min) - 1) & (wide < float(info.max) + 1)
    found = np.where(inside, wide, 0).astype(dtype)
    found = np.where(wide >= float(info.max) + (info.max < 2**53), info.max, found)
    found = np.where(wide <= float(info.min), info.min, found)
    return np.where(np.isnan(wide), dtype.type(0), found).astype(dtype)


# Largest relative errors that PTX states of approximations; of lg2 the absolute one near 1.
STATED = {
    "ex2": 2.0**-22, "lg2": 2.0**-22, "rcp": 2.0**-23, "rsqrt": 2.0**-22.9, "sqrt": 2.0**-23,
    "tanh": 2.0**-11, "sin": 2.0**-20.5, "cos": 2.0**-20.9, "div": 2.0**-22,
}  # fmt: skip
EXACT: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
}  # fmt: skip


def spread(wide: Array, name: str, share: float) -> Array:
    """Results moved by `share` of the error that PTX states, each by a draw from its own bits."""
    if share == 0:
        return wide
    bits = np.ascontiguousarray(wide).view(np.uint64)
    draw = (bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    draw = draw.astype(np.float64) * (2 / 2**24) - 1
    size = np.float64(STATED[name] * share) * draw
    if name in ("sin", "cos"):
        return wide + size
    near = (np.abs(wide) < 1) & (name == "lg2")
    return np.where(np.isfinite(wide), np.where(near, wide + size, wide * (1 + size)), wide)


def approximate(name: str, x: Array, share: float = 0.0) -> Array:
    """One of `EXACT` of float32, rounded from float64, moved by `share` of the stated error."""
    return spread(EXACT[name](x.astype(np.float64)), name, share).astype(np.float32)


def quotient(a: Array, b: Array, share: float = 0.0) -> Array:
    """div.full and div.approx of float32."""
    return spread(a.astype(np.float64) / b, "div", share).astype(np.float32)
