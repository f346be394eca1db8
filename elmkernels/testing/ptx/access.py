"""Instructions that touch memory: ld, st, atom, red, cp.async, ldmatrix, each access checked.

An access is within one region, aligned, of bytes that were written if it is a load; and, if races
are checked, in order with those of other threads.
"""

from collections.abc import Callable

import numpy as np

from .alu import DTYPES, unknown
from .faults import Fault
from .floats import Array
from .memory import LOCAL, PARAM, SHARED, TRACKED, WINDOW, WRITTEN, Space, apart
from .races import Clock, thread_name
from .source import BYTES, Instruction, Mem, Reg, Symbol, Variable, Vec
from .state import Lanes, Restart, Source, State, source

Run = Callable[[State, Lanes], None]
SPACES = ("global", "shared", "local", "param", "const")
_STRONG = {"acquire", "release", "acq_rel", "relaxed", "volatile", "mmio"}


def space_of(ins: Instruction) -> str:
    """The space that an instruction names, "" for generic addresses."""
    found = (s.partition("::")[0] for s in ins.suffixes)
    return next((s for s in found if s in SPACES), "")


def strong(suffixes: tuple[str, ...]) -> bool:
    """Whether other blocks see a load or a store in an order."""
    return bool(_STRONG & set(suffixes)) and "cta" not in suffixes


class Address:
    """`[base + offset]` in a space."""

    def __init__(self, operand: object, space: str):
        if not isinstance(operand, Mem):
            raise TypeError(f"an address must be in brackets, got {operand}")
        self.space, self.offset = space, operand.offset
        self.base = source(operand.base, "u64")
        self.narrow = source(operand.base, "u32")

    def of(self, state: State, lanes: Lanes) -> Array:
        """The addresses, as int64."""
        base = self.base
        if base.register >= 0 and state.widths[base.register] == 4:
            base = self.narrow
        return state.full(base, lanes).astype(np.int64) + self.offset


def locate(
    state: State, space: str, address: Array, lanes: Lanes
) -> tuple[str, Space, Array, Lanes]:
    """The space of addresses, by the first one's window if they are generic, and offsets into
    it."""
    if space == "":
        window = int(address[0]) // WINDOW * WINDOW
        space = {SHARED: "shared", LOCAL: "local", PARAM: "param"}.get(window, "global")
        address = address - {"shared": SHARED, "local": LOCAL, "param": PARAM}.get(space, 0)
    if space == "global":
        return space, state.memory, state.memory.offset(address), lanes
    if space == "shared":
        owner, stride, memory = state.slot, state.shared_stride, state.shared
    else:
        owner, stride, memory = state.lane, state.local_stride, state.local
    if (address < 0).any() or (address >= stride).any():
        bad = int(address[(address < 0) | (address >= stride)][0])
        raise Fault("bounds", f"byte {bad} of {memory.name}, which has fewer")
    return space, memory, address + state.of(owner, lanes) * stride, lanes


def _units(at: Array, size: int, unit: int, clock: Clock) -> tuple[Array, Clock]:
    count = max(1, size // unit)
    units = (at[:, None] // unit + np.arange(count)).ravel()
    return units, Clock(*(np.repeat(c, count) for c in clock))


def touch(
    state: State, space: str, memory: Space, at: Array, size: int, lanes: Lanes, kind: str
) -> tuple[bool, bool]:
    """Check an access of `size` bytes, and count it; whether some of it is tracked, and all."""
    some, every = memory.check(at, size, written=kind == "load")
    if state.traffic is not None and space == "global":
        state.traffic.access(kind, at, size, state.of(state.thread, lanes) // 32)
    elif state.traffic is not None and space == "shared":
        state.traffic.bank(kind, at, size, state.of(state.lane, lanes))
    return some, every


def _held(state: State, space: str) -> bool:
    return state.launch.settings.races and space in ("global", "shared")


def _shadow(state: State, space: str) -> tuple:
    """The shadow of a space and its unit."""
    if space == "global":
        return state.shadow, state.global_unit
    return state.shared_shadow, state.unit


def load(
    state: State,
    space: str,
    address: Array,
    lanes: Lanes,
    shape: tuple[int, int],
    suffixes: tuple[str, ...] = (),
) -> list[Array]:
    """`count` neighbours of `size` bytes: (size, count) is the shape. The suffixes say what kind of
    load it is."""
    size, count = shape
    if (parts := apart(space, address)) is not None:
        found = [np.empty(address.size, f"u{size}") for _ in range(count)]
        for part in parts:
            chosen = state.of(state.lane, lanes)[part]
            values = load(state, space, address[part], chosen, shape, suffixes)
            for whole, value in zip(found, values, strict=True):
                whole[part] = value
        return found
    if space == "param" or (space == "" and (address // WINDOW * WINDOW == PARAM).all()):
        offset = address - (0 if space else PARAM)
        raw = state.params[offset[:, None] + np.arange(size * count)]
        return list(np.ascontiguousarray(raw).view(f"u{size}").T)
    space, memory, at, lanes = locate(state, space, address, lanes)
    some, _ = touch(state, space, memory, at, size * count, lanes, "load")
    if state.order is not None and space == "global" and strong(suffixes):
        for place, thread in zip(at.tolist(), state.of(state.thread, lanes).tolist(), strict=True):
            state.order.acquire(place, thread, suffixes)
    elif some and _held(state, space):
        shadow, unit = _shadow(state, space)
        units, clock = _units(at, size * count, unit, state.clock(lanes))
        if "nc" in suffixes:
            shadow.constant(units, clock)
        shadow.read(units, clock)
    return memory.load(at, size, count)


def store(
    state: State,
    space: str,
    address: Array,
    lanes: Lanes,
    values: list[Array],
    size: int,
    suffixes: tuple[str, ...] = (),
) -> None:
    """The reverse."""
    if (parts := apart(space, address)) is not None:
        for part in parts:
            chosen = state.of(state.lane, lanes)[part]
            some = [value[part] for value in values]
            store(state, space, address[part], chosen, some, size, suffixes)
        return
    space, memory, at, lanes = locate(state, space, address, lanes)
    total = size * len(values)
    if space == "global":
        state.memory.changes += 1
        _tell(state, at, lanes, suffixes)
    _, every = touch(state, space, memory, at, total, lanes, "store")
    if _held(state, space) and (state.order is None or not strong(suffixes)):
        if not every:
            new = (memory.marks[at] & TRACKED) == 0  # of one instruction there may be several
            raise Restart(memory.region(int(at[new][0])))
        changed = np.zeros(at.size, bool)
        for before, value in zip(memory.load(at, size, len(values)), values, strict=True):
            changed |= before != value
        shadow, unit = _shadow(state, space)
        units, clock = _units(at, total, unit, state.clock(lanes))
        shadow.write(units, clock, np.repeat(changed, max(1, total // unit)))
    memory.store(at, values, size)
    for after, value in zip(memory.load(at, size, len(values)), values, strict=True):
        if (after != value).any():
            _torn(state, at, lanes, (after, value))


def _tell(state: State, at: Array, lanes: Lanes, suffixes: tuple[str, ...]) -> None:
    """Stores to global memory, of which strong ones tell other blocks what came before."""
    threads, epochs = state.of(state.thread, lanes), state.of(state.barriers, lanes)
    if state.order is None:
        return
    if not strong(suffixes):
        state.order.store(threads, epochs)
        return
    for place, thread, epoch in zip(at.tolist(), threads.tolist(), epochs.tolist(), strict=True):
        state.order.release(place, thread, epoch, suffixes)


def _torn(state: State, at: Array, lanes: Lanes, found: tuple[Array, Array]) -> None:
    """Two threads stored different values to one place in one instruction."""
    after, value = found
    bad = int(np.flatnonzero(after != value)[0])
    other = int(np.flatnonzero((at == at[bad]) & (value == after[bad]))[0])
    threads = state.of(state.thread, lanes)[[bad, other]].tolist()
    names = [thread_name(t, state.threads) for t in threads]
    numbers = [f"{int(v):#x}" for v in value[[bad, other]]]
    what = f"{names[0]} stores {numbers[0]} to where {names[1]} stores {numbers[1]} at once"
    raise Fault("race", what)


def _plain(ins: Instruction) -> tuple[int, int, str]:
    """Size and count of what an instruction moves, and its type."""
    count = next((int(s[1:]) for s in ins.suffixes if s in ("v2", "v4", "v8")), 1)
    return BYTES[ins.type], count, ins.type


def ld(ins: Instruction) -> Run:
    """ld and ldu."""
    size, count, kind = _plain(ins)
    space = "global" if space_of(ins) == "const" else space_of(ins)
    target, where = ins.operands[0], ins.operands[1]
    targets = target.items if isinstance(target, Vec) else (target,)
    if len(targets) != count:
        raise unknown(ins)
    address, signed = Address(where, space), kind[0] == "s"

    def run(state: State, lanes: Lanes) -> None:
        where, kinds = address.of(state, lanes), ins.suffixes
        values = load(state, space, where, lanes, (size, count), kinds)
        for register, value in zip(targets, values, strict=True):
            if isinstance(register, Reg):
                state.set(register.number, value.view(f"i{size}") if signed else value, lanes)

    return run


def ld_param(ins: Instruction, params: dict[str, Variable]) -> Run:
    """ld.param of a kernel: the same for all threads."""
    size, count, kind = _plain(ins)
    where, target = ins.operands[1], ins.operands[0]
    if not isinstance(where, Mem) or not isinstance(where.base, Symbol):
        return ld(ins)
    targets = target.items if isinstance(target, Vec) else (target,)
    offset, dtype = params[where.base.name].offset + where.offset, DTYPES[kind]

    def run(state: State, lanes: Lanes) -> None:
        for i, register in enumerate(targets):
            begin = offset + i * size
            if isinstance(register, Reg):
                value = state.params[begin : begin + size].copy().view(f"u{size}").view(dtype)
                state.set(register.number, value, lanes)

    return run


def st(ins: Instruction) -> Run:
    """st."""
    size, count, _ = _plain(ins)
    space, value = space_of(ins), ins.operands[1]
    parts = value.items if isinstance(value, Vec) else (value,)
    if len(parts) != count:
        raise unknown(ins)
    address = Address(ins.operands[0], space)
    sources = [source(p, f"u{8 * size}") for p in parts]

    def run(state: State, lanes: Lanes) -> None:
        values = [state.full(s, lanes) for s in sources]
        store(state, space, address.of(state, lanes), lanes, values, size, ins.suffixes)

    return run


def cp_async(ins: Instruction) -> Run:
    """cp.async and what closes and awaits its groups. The bytes arrive when they are waited for, no
    sooner: until then what lies there counts as not written."""
    what = ins.suffixes[1]
    if what == "commit_group":
        return _commit
    if what in ("wait_group", "wait_all"):
        left = source(ins.operands[0], "u32") if ins.operands else None
        return lambda state, lanes: _wait(state, lanes, left)
    if "shared" not in {s.partition("::")[0] for s in ins.suffixes}:
        raise unknown(ins)
    to, origin = Address(ins.operands[0], "shared"), Address(ins.operands[1], "global")
    size = int(getattr(ins.operands[2], "bits", 0))
    given = source(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def run(state: State, lanes: Lanes) -> None:
        target = to.of(state, lanes)
        data = np.zeros((target.size, size), np.uint8)
        real = np.full(target.size, size) if given is None else state.full(given, lanes)
        here = np.flatnonzero(real)
        if (real[here] != size).any():
            raise unknown(ins, "a partial copy")
        if here.size:
            chosen = here if lanes is None else lanes[here]
            begin = origin.of(state, lanes)[here]
            words = load(state, "global", begin, chosen, (4, size // 4))
            data[here] = np.stack(words, 1).view(np.uint8).reshape(here.size, size)
        _, memory, at, _ = locate(state, "shared", target, lanes)
        memory.check(at, size, written=False)
        memory.mark(at, size, WRITTEN, on=False)
        own = state.lane if lanes is None else lanes
        state.copies.append((own, state.of(state.groups, lanes).copy(), target, data))

    return run


def _commit(state: State, lanes: Lanes) -> None:
    state.groups[slice(None) if lanes is None else lanes] += 1


def _wait(state: State, lanes: Lanes, left: Source | None) -> None:
    waits = np.zeros(state.count, bool)
    waits[slice(None) if lanes is None else lanes] = True
    # wait_all also waits for what no group holds yet.
    last = state.groups - (-1 if left is None else int(state.get(left, lanes)[0]))
    rest = []
    for own, group, target, data in state.copies:
        done = waits[own] & (group < last[own])
        if done.any():
            words = list(np.ascontiguousarray(data[done]).view(np.uint32).T)
            store(state, "shared", target[done], own[done], words, 4)
        if not done.all():
            rest.append((own[~done], group[~done], target[~done], data[~done]))
    state.copies = rest


def ldmatrix(ins: Instruction) -> Run:
    """ldmatrix.m8n8.xN[.trans].shared.b16: lane i of a warp names the i-th row of 16 bytes; each
    lane gets two neighbours of row lane // 4, or of column lane // 4 if transposed."""
    count = next((int(s[1:]) for s in ins.suffixes if s in ("x1", "x2", "x4")), 0)
    target = ins.operands[0]
    targets = target.items if isinstance(target, Vec) else (target,)
    if not count or "m8n8" not in ins.suffixes or ins.type != "b16" or len(targets) != count:
        raise unknown(ins)
    address, trans = Address(ins.operands[1], "shared"), "trans" in ins.suffixes

    def run(state: State, lanes: Lanes) -> None:
        state.whole_warps(lanes, -1, "ldmatrix")
        rows = address.of(state, lanes).reshape(-1, 32)[:, : 8 * count]
        chosen = (state.lane if lanes is None else lanes).reshape(-1, 32)[:, : 8 * count]
        words = load(state, "shared", rows.ravel(), chosen.ravel(), (4, 4))
        halves = np.stack(words, 1).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        found = halves.view(np.uint32).reshape(-1, count, 32)
        for i, register in enumerate(targets):
            if isinstance(register, Reg):
                state.set(register.number, np.ascontiguousarray(found[:, i]).ravel(), lanes)

    return run


_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda a, b: b,
}  # fmt: skip


def atom(ins: Instruction) -> Run:
    """atom and red: lane after lane."""
    name = next((s for s in ins.suffixes if s in (*_ATOMIC, "cas", "inc")), "")
    kind, gives = ins.type, ins.op == "atom"
    if name not in (*_ATOMIC, "cas") or DTYPES[kind].kind == "f" or "v2" in ins.suffixes:
        raise unknown(ins)
    size, dtype, space = BYTES[kind], DTYPES[kind], space_of(ins)
    operands = ins.operands[1:] if gives else ins.operands
    address = Address(operands[0], space)
    sources = [source(o, kind) for o in operands[1:]]
    target = ins.operands[0]

    def run(state: State, lanes: Lanes) -> None:
        where = address.of(state, lanes)
        if apart(space, where) is not None:
            raise unknown(ins, "several spaces at once")
        values = [state.full(s, lanes) for s in sources]
        named, memory, at, _ = locate(state, space, where, lanes)
        touch(state, named, memory, at, size, lanes, "load")
        if named == "global" and state.order is not None:
            state.memory.changes += 1
            for place, one in zip(at.tolist(), state.of(state.lane, lanes).tolist(), strict=True):
                thread = int(state.thread[one])
                if "cta" in ins.suffixes:
                    continue
                if gives:
                    state.order.acquire(place, thread, ins.suffixes)
                state.order.release(place, thread, int(state.barriers[one]), ins.suffixes)
        view = memory.bytes.view(dtype)
        before = np.empty(at.size, dtype)
        for i, place in enumerate(at // size):
            before[i] = view[place]
            if name == "cas":
                view[place] = values[1][i] if before[i] == values[0][i] else before[i]
            else:
                view[place] = _ATOMIC[name](before[i : i + 1], values[0][i : i + 1])[0]
        if gives and isinstance(target, Reg):
            state.set(target.number, before, lanes)

    return run
