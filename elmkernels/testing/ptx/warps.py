"""Instructions by which the 32 threads of a warp share what they have: shfl, vote, redux, mma.

All lanes that the membermask names must come to one of these together; if others do, it is a Fault.
"""

import numpy as np

from . import floats
from .access import Run
from .alu import DTYPES, unknown
from .faults import Fault
from .floats import Array
from .source import Const, Instruction, Reg, Vec
from .state import Lanes, Source, State, source


def _mask(state: State, mask: Source, lanes: Lanes) -> int:
    values = np.unique(state.get(mask, lanes))
    if values.size > 1:
        raise Fault("barrier", "lanes name different membermasks at once")
    return int(values[0])


def shfl(ins: Instruction) -> Run:
    """shfl.sync.mode.b32 d[|p], a, b, c, membermask."""
    mode, both = ins.suffixes[1], len(ins.operands) == 6
    if ins.suffixes[0] != "sync" or mode not in ("up", "down", "bfly", "idx"):
        raise unknown(ins)
    first, *rest = ins.operands
    predicate = rest.pop(0) if both else None
    value, other, clamp, mask = (source(o, "b32") for o in rest)

    def run(state: State, lanes: Lanes) -> None:
        members = _mask(state, mask, lanes)
        state.whole_warps(lanes, members, "shfl.sync")
        lane = state.of(state.lane, lanes)
        own = lane % 32
        b = state.get(other, lanes).astype(np.int64) & 31
        c = state.get(clamp, lanes).astype(np.int64)
        segment, bound = c >> 8 & 31, c & 31
        most = (own & segment) | (bound & ~segment)
        least = own & segment
        at = {"up": own - b, "down": own + b, "bfly": own ^ b, "idx": least | (b & ~segment)}[mode]
        valid = at >= most if mode == "up" else at <= most
        at = np.where(valid, at, own)
        if lanes is not None and (members >> at & 1 == 0).any():
            raise Fault("barrier", "shfl.sync reads a lane that its membermask doesn't name")
        whole = state.regs[value.register] if value.register >= 0 else state.get(value, None)
        if whole is None:
            raise Fault("register", f"{state.names[value.register]} is read before it is written")
        whole = whole.view(np.uint32)
        found = whole if whole.size == 1 else whole[lane - own + at]
        if isinstance(first, Reg):
            state.set(first.number, found, lanes)
        if isinstance(predicate, Reg):
            state.set(predicate.number, valid, lanes)

    return run


def _spread(per_warp: Array) -> Array:
    return np.repeat(per_warp, 32)


def vote(ins: Instruction) -> Run:
    """vote.sync.all, .any, .uni and .ballot."""
    mode = ins.suffixes[1]
    if ins.suffixes[0] != "sync" or mode not in ("all", "any", "uni", "ballot"):
        raise unknown(ins)
    target, value, mask = ins.operands
    if not isinstance(target, Reg):
        raise unknown(ins)
    value, mask, register = source(value, "pred"), source(mask, "b32"), target.number

    def run(state: State, lanes: Lanes) -> None:
        members = _mask(state, mask, lanes)
        state.whole_warps(lanes, members, "vote.sync")
        told = np.zeros((state.count // 32, 32), bool)
        lane = state.of(state.lane, lanes)
        told.ravel()[lane] = state.full(value, lanes)
        wanted = (members >> np.arange(32) & 1).astype(bool)
        every, some = (told | ~wanted).all(1), (told & wanted).any(1)
        bits = (told & wanted).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        found = {
            "all": every, "any": some, "uni": every | ~some,
            "ballot": bits.sum(1).astype(np.uint32),
        }[mode]  # fmt: skip
        state.set(register, found[lane // 32], lanes)

    return run


def redux(ins: Instruction) -> Run:
    """redux.sync.op.type of 32-bit integers."""
    fold = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }.get(ins.suffixes[1])  # fmt: skip
    target = ins.operands[0]
    if fold is None or not isinstance(target, Reg) or ins.type == "f32":
        raise unknown(ins)
    value, mask = source(ins.operands[1], ins.type), source(ins.operands[2], "b32")

    def run(state: State, lanes: Lanes) -> None:
        members = _mask(state, mask, lanes)
        state.whole_warps(lanes, members, "redux.sync")
        if members & 0xFFFFFFFF != 0xFFFFFFFF:
            raise unknown(ins, "a membermask of some lanes")
        values = state.full(value, lanes).reshape(-1, 32)
        state.set(target.number, _spread(fold.reduce(values, 1, dtype=DTYPES[ins.type])), lanes)

    return run


def _group(lane: Array) -> tuple[Array, Array]:
    return lane // 4, lane % 4


def fragment(shape: tuple[int, int], operand: str, per: int) -> tuple[Array, Array]:
    """Rows and columns of the elements that each lane has of a matrix of mma.m16n8kK.

    Args:
        shape: of the matrix: [16, k] for "a", [k, 8] for "b", [16, 8] for "c".
        operand: "a", "b" or "c".
        per: elements in a register of 32 bits.

    Returns:
        Two [32, registers, per] arrays.
    """
    lane = np.arange(32)[:, None, None]
    group, within = _group(lane)
    size = shape[0] * shape[1] // 32 // per
    register, element = np.arange(size)[None, :, None], np.arange(per)[None, None, :]
    if operand == "a":
        rows = group + 8 * (register % 2)
        columns = within * per + element + 4 * per * (register // 2)
    elif operand == "b":
        rows = within * per + element + 4 * per * register
        columns = group + 0 * (register + element)
    else:
        rows = group + 8 * (register // 2) + 0 * element
        columns = within * 2 + register % 2 + 0 * element
        if per == 2:
            rows, columns = group + 8 * register + 0 * element, within * 2 + element + 0 * register
    rows, columns = np.broadcast_arrays(rows, columns)
    return rows, columns


_MMA = {"bf16": 2, "f16": 2, "tf32": 1}


def mma(ins: Instruction) -> Run:
    """mma.sync.aligned.m16n8kK.row.col.D.A.B.C: D = A B + C, products exact, the sum rounded once
    to float32: within what the hardware may do, which leaves order and rounding open."""
    shape = next((s for s in ins.suffixes if s.startswith("m16n8k")), "")
    types = [s for s in ins.suffixes if s in DTYPES]
    registers = [o.items for o in ins.operands if isinstance(o, Vec)]
    if not shape or len(types) != 4 or len(registers) != 4 or types[1] not in _MMA:
        raise unknown(ins)
    k, kind = int(shape[6:]), types[1]
    if types[0] != "f32" or types[3] != "f32" or types[1] != types[2]:
        raise unknown(ins)
    layouts = [
        fragment((16, 8), "c", 1), fragment((16, k), "a", _MMA[kind]),
        fragment((k, 8), "b", _MMA[kind]),
    ]  # fmt: skip
    a, b, c = ([source(o, "b32") for o in items] for items in registers[1:])

    def matrix(state: State, lanes: Lanes, parts: list[Source], which: int) -> Array:
        rows, columns = layouts[which]
        raw = np.stack([state.full(s, lanes) for s in parts], 1)
        raw = raw.reshape(-1, 32, len(parts))
        if which == 0 or kind == "tf32":
            bits = raw if which == 0 else raw & np.uint32(0xFFFFE000)
            values = bits.view(np.float32)[..., None]
        else:
            values = floats.WIDEN[kind](raw.view(np.uint16)).reshape(*raw.shape, 2)
        shape = {0: (16, 8), 1: (16, k), 2: (k, 8)}[which]
        found = np.empty((raw.shape[0], *shape), np.float64)
        found[:, rows, columns] = values
        return found

    def run(state: State, lanes: Lanes) -> None:
        state.whole_warps(lanes, -1, "mma.sync")
        product = matrix(state, lanes, a, 1) @ matrix(state, lanes, b, 2)
        total = (product + matrix(state, lanes, c, 0)).astype(np.float32)
        rows, columns = layouts[0]
        found = total[:, rows, columns][..., 0]
        for i, target in enumerate(registers[0]):
            if isinstance(target, Reg):
                state.set(target.number, np.ascontiguousarray(found[:, :, i]).ravel(), lanes)

    return run


def warp_sync(ins: Instruction) -> Run:
    """bar.warp.sync: what its lanes did is in order with what they do."""
    mask = source(ins.operands[0] if ins.operands else Const(-1), "b32")

    def run(state: State, lanes: Lanes) -> None:
        state.whole_warps(lanes, _mask(state, mask, lanes), "bar.warp.sync")
        state.syncs[slice(None) if lanes is None else lanes] += 1

    return run
