"""Instructions that compute: from values to values, without memory and without other threads.

`pure(instruction, share)` gives a numpy function with the types that it takes and gives. Registers
are arrays of unsigned integers, floats or booleans with one element a thread, or one for all.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import floats
from .faults import PtxError
from .floats import Array
from .source import BYTES, Instruction

F32 = np.dtype(np.float32)
DTYPES: dict[str, np.dtype] = {
    **{f"{k}{8 * n}": np.dtype(f"u{n}") for k in "bu" for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    "f16": np.dtype("u2"), "bf16": np.dtype("u2"), "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"), "tf32": F32, "f32": F32, "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}  # fmt: skip
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


class Pure(NamedTuple):
    """A function, the types of its sources and those of what it gives."""

    fn: Callable
    sources: tuple[str, ...]
    results: tuple[str, ...]


def unknown(ins: Instruction, why: str = "this form") -> PtxError:
    """The error that names an instruction."""
    return PtxError(f"{why} of {'.'.join((ins.op, *ins.suffixes))} isn't known: {ins}")


def _shift(name: str, dtype: np.dtype) -> Callable:
    bits = dtype.itemsize * 8

    def shift(a: Array, by: Array) -> Array:
        inside = np.minimum(by, bits - 1).astype(dtype)
        if name == "shl":
            return np.where(by < bits, a << inside, dtype.type(0))
        if dtype.kind == "i":
            return a >> inside
        return np.where(by < bits, a >> inside, dtype.type(0))

    return shift


def _divide(name: str, dtype: np.dtype) -> Callable:
    def divide(a: Array, b: Array) -> Array:
        safe = np.where(b == 0, dtype.type(1), b)
        rest = np.fmod(a, safe)
        if name == "rem":
            return rest
        whole = (a - rest) // safe
        return np.where(b == 0, dtype.type(-1 if dtype.kind == "i" else np.iinfo(dtype).max), whole)

    return divide


def _multiply(ins: Instruction) -> Pure:
    """mul and mad of integers: .lo, .hi, .wide."""
    kind = ins.type
    dtype = DTYPES[kind]
    names = (kind, kind)
    wider = f"{kind[0]}{dtype.itemsize * 16}"
    if "wide" in ins.suffixes:
        wide = DTYPES[wider]
        if ins.op == "mul":
            return Pure(lambda a, b: a.astype(wide) * b.astype(wide), names, (wider,))
        return Pure(lambda a, b, c: a.astype(wide) * b.astype(wide) + c, (*names, wider), (wider,))
    if "hi" in ins.suffixes:
        if dtype.itemsize == 8:
            raise unknown(ins)
        wide, bits = DTYPES[wider], dtype.itemsize * 8

        def high(a: Array, b: Array, c: Array | int = 0) -> Array:
            return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(dtype) + c

        return Pure(high, names if ins.op == "mul" else (*names, kind), (kind,))
    if ins.op == "mul":
        return Pure(np.multiply, names, (kind,))
    return Pure(lambda a, b, c: a * b + c, (*names, kind), (kind,))


def _extreme(name: str, a: Array, b: Array) -> Array:
    """min or max of float32: NaN gives way, and -0 is below 0."""
    found = np.fmin(a, b) if name == "min" else np.fmax(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        sign = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
        found = np.where(zeros, np.where(sign, np.float32(-0.0), np.float32(0.0)), found)
    return found


def _float(ins: Instruction, share: float) -> Pure:
    """Arithmetic of float32, with .ftz and .sat round it."""
    name, count = ins.op, 2
    mode = next((s for s in ins.suffixes if s in ROUNDINGS), "rn")
    approximate = "approx" in ins.suffixes
    if name in ("add", "sub", "mul") and mode == "rn":
        fn = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    elif name in ("add", "sub", "mul"):
        one = np.ones(1, np.float32)
        fn = {
            "add": lambda a, b: floats.fma32(a, one, b, mode),
            "sub": lambda a, b: floats.fma32(b, -one, a, mode),
            "mul": lambda a, b: floats.round32(a.astype(np.float64) * b, mode),
        }[name]
    elif name in ("fma", "mad"):
        fn, count = lambda a, b, c: floats.fma32(a, b, c, mode), 3
    elif name == "div":
        exact = mode == "rn" and not approximate and "full" not in ins.suffixes
        fn = np.divide if exact else lambda a, b: floats.quotient(a, b, share)
    elif name in ("min", "max") and not {"NaN", "abs"} & set(ins.suffixes):
        fn = lambda a, b: _extreme(name, a, b)  # noqa: E731
    elif name in floats.EXACT and approximate:
        fn, count = lambda a: floats.approximate(name, a, share), 1
    elif name in ("rcp", "sqrt") and mode == "rn":
        fn, count = (np.sqrt if name == "sqrt" else np.reciprocal), 1
    elif name in ("neg", "abs"):
        fn, count = (np.negative if name == "neg" else np.abs), 1
    else:
        raise unknown(ins)
    if "ftz" in ins.suffixes:
        plain = fn
        fn = lambda *a: floats.flush(plain(*map(floats.flush, a)))  # noqa: E731
    if "sat" in ins.suffixes:
        inner = fn
        fn = lambda *a: floats.saturate(inner(*a))  # noqa: E731
    return Pure(fn, ("f32",) * count, ("f32",))


def _half(ins: Instruction) -> Pure:
    kind, name = ins.type, ins.op
    if name in ("add", "sub", "mul", "fma") and not {"ftz", "sat", "relu"} & set(ins.suffixes):
        count = 3 if name == "fma" else 2
        return Pure(lambda *a: floats.half(name, kind, *a), (kind,) * count, (kind,))
    sign = DTYPES[kind].type(0x80008000 if kind.endswith("x2") else 0x8000)
    if name == "neg":
        return Pure(lambda a: a ^ sign, (kind,), (kind,))
    if name == "abs":
        return Pure(lambda a: a & ~sign, (kind,), (kind,))
    if name in ("min", "max") and not kind.endswith("x2"):
        widen, narrow = floats.WIDEN[kind], floats.NARROW[kind]
        return Pure(lambda a, b: narrow(_extreme(name, widen(a), widen(b))), (kind,) * 2, (kind,))
    raise unknown(ins)


def _integer(ins: Instruction) -> Pure:
    """add, sub, min, max, neg, abs and the logic of integers and predicates."""
    kind = ins.type
    if {"sat", "cc"} & set(ins.suffixes):
        raise unknown(ins)
    two = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    if ins.op in two:
        return Pure(two[ins.op], (kind, kind), (kind,))
    one = {"not": np.invert, "neg": np.negative, "abs": np.abs}
    return Pure(one[ins.op], (kind,), (kind,))


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def _setp(ins: Instruction) -> Pure:
    """setp.compare[.boolean].type p[|q], a, b[, c]."""
    kind, name = ins.type, ins.suffixes[0]
    widen = floats.WIDEN.get(kind, lambda x: x)
    if "ftz" in ins.suffixes:
        widen = floats.flush
    real = kind in ("f32", "f64", "f16", "bf16")

    def compare(a: Array, b: Array) -> Array:
        a, b = widen(a), widen(b)
        if name in ("num", "nan"):
            return (np.isnan(a) | np.isnan(b)) ^ (name == "num")
        if real and name[:-1] in _COMPARE and name.endswith("u"):
            return _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        found = _COMPARE[name](a, b)
        return found & ~(np.isnan(a) | np.isnan(b)) if real and name == "ne" else found

    if name not in _COMPARE and name not in ("num", "nan") and name[:-1] not in _COMPARE:
        raise unknown(ins)
    both = len(ins.operands) - (3 if ins.suffixes[1] not in ("and", "or", "xor") else 4)
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(ins.suffixes[1])

    def setp(a: Array, b: Array, c: Array | None = None) -> Array | tuple:
        found = compare(a, b)
        if join is None or c is None:
            return (found, ~found) if both else found
        return (join(found, c), join(~found, c)) if both else join(found, c)

    sources = (kind, kind, "pred") if join else (kind, kind)
    return Pure(setp, sources, ("pred",) * (1 + both))


def _bits(ins: Instruction) -> Pure:
    """bfe, bfi, popc, clz, brev, lop3, prmt."""
    kind = ins.type
    dtype = DTYPES[kind]
    size = dtype.itemsize * 8
    plain = np.dtype(f"u{dtype.itemsize}")

    def mask(length: Array) -> Array:
        some = (plain.type(1) << np.minimum(length, size - 1).astype(plain)) - plain.type(1)
        return np.where(length >= size, ~plain.type(0), some)

    def bfe(a: Array, at: Array, length: Array) -> Array:
        at, length = at & 0xFF, length & 0xFF
        raw = a.view(plain)
        found = np.where(at < size, raw >> np.minimum(at, size - 1).astype(plain), plain.type(0))
        found = found & mask(length)
        if dtype.kind == "i":
            last = np.clip(at.astype(np.int64) + length - 1, 0, size - 1).astype(plain)
            negative = ((raw >> last) & plain.type(1)).astype(bool) & (length > 0)
            kept = np.minimum(length, np.maximum(size - at.astype(np.int64), 0))
            found = np.where(negative, found | ~mask(kept), found)
        return found.astype(plain).view(dtype)

    def bfi(a: Array, b: Array, at: Array, length: Array) -> Array:
        at, length = at & 0xFF, length & 0xFF
        by = np.minimum(at, size - 1).astype(plain)
        where = np.where(at < size, mask(length) << by, plain.type(0))
        return (b & ~where) | ((a << by) & where)

    if ins.op == "bfe":
        return Pure(bfe, (kind, "u32", "u32"), (kind,))
    if ins.op == "bfi":
        return Pure(bfi, (kind, kind, "u32", "u32"), (kind,))
    if ins.op == "lop3":
        return Pure(_lop3, ("b32",) * 4, ("b32",))
    if ins.op == "prmt" and len(ins.suffixes) == 1:
        return Pure(_prmt, ("b32",) * 3, ("b32",))
    if ins.op in ("popc", "clz", "brev"):
        return Pure(lambda a: _count(ins.op, a), (kind,), (kind if ins.op == "brev" else "u32",))
    raise unknown(ins)


def _count(name: str, a: Array) -> Array:
    size = a.dtype.itemsize
    bits = np.unpackbits(np.ascontiguousarray(a).astype(f">u{size}").view(np.uint8))
    bits = bits.reshape(-1, size * 8)
    if name == "popc":
        return bits.sum(1).astype(np.uint32)
    if name == "clz":
        return np.where(bits.any(1), bits.argmax(1), size * 8).astype(np.uint32)
    return np.packbits(bits[:, ::-1]).view(f">u{size}").astype(a.dtype)


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    found = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        terms = [x if i >> at & 1 else ~x for x, at in ((a, 2), (b, 1), (c, 0))]
        keep = np.where(table >> np.uint32(i) & np.uint32(1), ~np.uint32(0), np.uint32(0))
        found |= terms[0] & terms[1] & terms[2] & keep
    return found


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    wide = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros(np.broadcast(wide, selector).shape, np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (wide >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found


def _cvt(ins: Instruction, share: float) -> Pure:
    """cvt[.rounding][.relu][.sat].to.from; a pair of float32 packs into 32 bits."""
    kinds = [s for s in ins.suffixes if s in BYTES]
    if len(kinds) != 2:
        raise unknown(ins)
    to, source = kinds
    mode = next((s for s in ins.suffixes if s in (*ROUNDINGS, "rni", "rzi", "rmi", "rpi")), "rn")
    extras = set(ins.suffixes) - {mode, to, source}
    if extras - {"sat", "ftz", "relu"} or (extras & {"sat", "relu"} and source != "f32"):
        raise unknown(ins)
    if to.endswith("x2"):
        narrow, one = floats.NARROW[to[:-2]], _before(extras)

        def pack(a: Array, b: Array) -> Array:
            return narrow(one(a), mode).astype(np.uint32) << np.uint32(16) | narrow(one(b), mode)

        return Pure(pack, ("f32", "f32"), (to,))
    before = _before(extras) if source == "f32" else lambda x: x
    widen = floats.WIDEN.get(source, before)
    target = DTYPES[to]
    if to in floats.NARROW:
        narrow = floats.NARROW[to]
        if source in DTYPES and DTYPES[source].kind in "iu" and source not in floats.WIDEN:
            return Pure(
                lambda a: narrow(floats.odd32(a.astype(np.float64)), mode), (source,), (to,)
            )
        return Pure(lambda a: narrow(widen(a), mode), (source,), (to,))
    if to == "tf32":
        return Pure(lambda a: floats.to_tf32(a, mode), (source,), (to,))
    if to in ("f32", "f64"):
        if source == "f64" and to == "f32":
            return Pure(lambda a: floats.round32(a, mode), (source,), (to,))
        whole = next((m for m in ("rni", "rzi", "rmi", "rpi") if m == mode), None)
        if whole or (mode != "rn" and source not in floats.WIDEN):
            raise unknown(ins)
        return Pure(lambda a: widen(a).astype(target), (source,), (to,))
    if source in (*floats.WIDEN, "f32", "f64"):
        return Pure(lambda a: floats.to_integer(widen(a), mode, target), (source,), (to,))
    if "sat" in extras:
        raise unknown(ins)
    return Pure(lambda a: a.astype(target), (source,), (to,))


def _before(extras: set[str]) -> Callable[[Array], Array]:
    """What .ftz, .sat and .relu do to a float32 that is converted."""

    def before(x: Array) -> Array:
        x = floats.flush(x) if "ftz" in extras else x
        x = floats.saturate(x) if "sat" in extras else x
        return np.where(x < 0, np.float32(0), x) if "relu" in extras else x

    return before


def _select(ins: Instruction) -> Pure:
    kind = ins.type
    return Pure(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), (kind,))


_INTEGERS = ("add", "sub", "min", "max", "and", "or", "xor", "not", "neg", "abs")


def pure(ins: Instruction, share: float = 0.0) -> Pure | None:
    """What an instruction computes, or None if it isn't one that only computes.

    Args:
        ins: the instruction.
        share: of the error that PTX states, by which approximations are moved.

    Returns:
        The function and its types.

    Raises:
        PtxError: a form of it isn't known.

    Example:
        >>> add = parse(".visible .entry k() { .reg .b32 %r<3>; add.s32 %r0, %r1, %r2; }")
        >>> pure(add.functions["k"].instructions[0]).sources
        ('s32', 's32')
    """
    op, kind = ins.op, ins.type
    if op in ("mul", "mad") and kind[:1] in "us":
        return _multiply(ins)
    if op in ("shl", "shr"):
        return Pure(_shift(op, DTYPES[kind]), (kind, "u32"), (kind,))
    if op in ("div", "rem") and kind[:1] in "us":
        return Pure(_divide(op, DTYPES[kind]), (kind, kind), (kind,))
    if op in ("setp", "selp"):
        return _setp(ins) if op == "setp" else _select(ins)
    if op in ("bfe", "bfi", "popc", "clz", "brev", "lop3", "prmt"):
        return _bits(ins)
    if op == "cvt":
        return _cvt(ins, share)
    if kind == "f32" and op in ("add", "sub", "mul", "fma", "div", "min", "max", "neg", "abs",
                                "mad", *floats.EXACT):  # fmt: skip
        return _float(ins, share)
    if kind in HALVES and op in ("add", "sub", "mul", "fma", "neg", "abs", "min", "max"):
        return _half(ins)
    if op in _INTEGERS and kind in DTYPES and DTYPES[kind].kind in "iub":
        return _integer(ins)
    return None
