"""The state of the threads that run at once: registers, memories, what synchronized them last.

Lanes are the threads of some blocks, block after block. Those that an instruction is for are None
(all) or a sorted array of lane numbers. A register is an array with an element a lane, or of one
element that all have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .alu import DTYPES
from .faults import Fault, PtxError
from .floats import Array
from .memory import GUARD, LOCAL, SHARED, THERE, TRACKED, Region, Space, Tensors
from .races import Clock, Order, Shadow
from .source import BYTES, Const, Operand, Reg, Symbol
from .traffic import Traffic

Lanes = Array | None


class Source(NamedTuple):
    """Where a value comes from: a register, a constant or a symbol's address."""

    register: int
    constant: Array | None
    dtype: np.dtype
    negated: bool = False
    symbol: str = ""


def source(operand: Operand, kind: str) -> Source:
    """An operand read as `kind`."""
    dtype = DTYPES[kind]
    if isinstance(operand, Reg):
        return Source(operand.number, None, dtype, operand.negated)
    if isinstance(operand, Symbol):
        return Source(-1, None, dtype, symbol=operand.name)
    if not isinstance(operand, Const):
        raise PtxError(f"an operand isn't known: {operand}")
    if dtype.kind == "f" and operand.size == 0:
        number = operand.decimal if operand.decimal is not None else float(operand.bits)
        return Source(-1, np.array([number], dtype), dtype)
    if dtype.kind == "b":
        return Source(-1, np.array([bool(operand.bits)]), dtype)
    mask = (1 << (8 * dtype.itemsize)) - 1
    bits = np.array([operand.bits & mask], f"u{dtype.itemsize}")
    return Source(-1, bits.view(dtype), dtype)


class Apart(Fault):
    """Some lanes of a warp came to what all of it must come to; those of other warps, which are
    whole, are `ready`. If the others never come it is a fault.
    """

    def __init__(self, what: str, ready: Array):
        super().__init__("barrier", what)
        self.ready = ready


class Restart(Exception):
    """A launch stores into a region that wasn't known to be stored into: its loads so far were not
    held against its stores.
    """

    def __init__(self, region: int):
        super().__init__(region)
        self.region = region


@dataclass
class Settings:
    """How a launch is executed.

    Args:
        races: whether accesses are held against each other.
        traffic: whether sectors and bank conflicts are counted.
        share: of the error that PTX states, by which approximations are moved.
        order: of the blocks: "forward", "backward" or "shuffled".
        lanes: how many threads run at once, at least those of one block.
    """

    races: bool = True
    traffic: bool = False
    share: float = 0.0
    order: str = "forward"
    lanes: int = 8192


@dataclass
class Launch:
    """A grid of blocks: their threads, shared memory in bytes, the parameters as bytes, memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    params: bytes
    memory: Tensors
    settings: Settings = field(default_factory=Settings)

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


class State:
    """Some blocks of a launch that run at once.

    Args:
        launch: the whole grid.
        blocks: the linear numbers of these.
        registers: (name, type) of each.
        symbols: addresses of variables.
        sizes: bytes of shared memory a block and of local memory a thread.
        units: the smallest access of shared and of global memory, in bytes.
        shadow: what is known of global memory's accesses, in all blocks so far.
        traffic: where accesses are counted.
    """

    def __init__(
        self,
        launch: Launch,
        blocks: Sequence[int],
        registers: Sequence[tuple[str, str]],
        symbols: dict[str, int],
        sizes: tuple[int, int],
        units: tuple[int, int],
        shadow: Shadow | None,
        traffic: Traffic | None,
    ):
        self.launch, self.symbols, self.shadow, self.traffic = launch, symbols, shadow, traffic
        self.order: Order | None = None  # of blocks that can order each other
        threads = self.threads = launch.threads
        self.count = threads * len(blocks)
        self.lane = np.arange(self.count)
        self.slot = self.lane // threads
        self.thread = np.asarray(blocks, np.int64)[self.slot] * threads + self.lane % threads
        self.barriers = np.zeros(self.count, np.int64)
        self.syncs = np.zeros(self.count, np.int64)
        self.names = [name for name, _ in registers]
        self.widths = [1 if t == "pred" else BYTES.get(t, 4) for _, t in registers]
        self.regs: list[Array | None] = [
            self._special(name) if kind == "special" else None for name, kind in registers
        ]
        self.memory = launch.memory
        self.params = np.frombuffer(launch.params + bytes(16), np.uint8)
        self.shared, self.shared_stride = self._private(sizes[0], len(blocks), "shared memory")
        self.local, self.local_stride = self._private(sizes[1], self.count, "local memory")
        self.unit, self.global_unit = units
        self.shared_shadow = Shadow(self.shared.bytes.size // self.unit + 1, threads)
        self.copies: list = []  # asynchronous ones that nothing has waited for
        self.groups = np.zeros(self.count, np.int64)  # of copies that each thread has closed

    def _private(self, size: int, owners: int, name: str) -> tuple[Space, int]:
        stride = -(-size // 16) * 16 + GUARD if size else 0
        space = Space(stride * owners, name)
        marks = np.zeros((owners, stride), np.uint8)
        marks[:, :size] = THERE | TRACKED
        space.marks[:] = marks.ravel()
        for owner in range(min(owners, 64)) if size else ():
            space.regions.append(Region(f"{name} {owner}", owner * stride, size))
        return space, stride

    def _special(self, name: str) -> Array:
        """tid, ntid, ctaid, nctaid and what follows from them."""
        x, y, z = self.launch.block
        gx, gy, gz = self.launch.grid
        inner, block = self.lane % self.threads, self.thread // self.threads
        found = {
            "%tid.x": inner % x, "%tid.y": inner // x % y, "%tid.z": inner // (x * y),
            "%ctaid.x": block % gx, "%ctaid.y": block // gx % gy, "%ctaid.z": block // (gx * gy),
            "%ntid.x": [x], "%ntid.y": [y], "%ntid.z": [z], "%laneid": inner % 32,
            "%nctaid.x": [gx], "%nctaid.y": [gy], "%nctaid.z": [gz], "%warpid": inner // 32,
        }.get(name)  # fmt: skip
        if found is None:
            raise PtxError(f"a special register isn't known: {name}")
        return np.asarray(found).astype(np.uint32)

    def get(self, s: Source, lanes: Lanes) -> Array:
        """A value for these lanes: an element each, or one for all."""
        if s.register < 0:
            if s.constant is not None:
                return s.constant
            if s.symbol not in self.symbols:
                raise PtxError(f"a name isn't known: {s.symbol}")
            return np.array([self.symbols[s.symbol]], np.uint64).astype(s.dtype)
        value = self.regs[s.register]
        if value is None:
            raise Fault("register", f"{self.names[s.register]} is read before it is written")
        if lanes is not None and value.size > 1:
            value = value[lanes]
        if value.dtype != s.dtype:
            if value.dtype.itemsize == s.dtype.itemsize and value.dtype.kind != "b":
                value = value.view(s.dtype)
            elif value.dtype.itemsize > s.dtype.itemsize:
                whole = value.view(f"u{value.dtype.itemsize}")
                value = whole.astype(f"u{s.dtype.itemsize}").view(s.dtype)
            else:
                raise PtxError(f"{self.names[s.register]} is too narrow for {s.dtype}")
        return ~value if s.negated else value

    def full(self, s: Source, lanes: Lanes) -> Array:
        """The same, an element for each of the lanes."""
        value = self.get(s, lanes)
        size = self.count if lanes is None else lanes.size
        return value if value.size == size and size > 1 else np.repeat(value, size // value.size)

    def set(self, register: int, value: Array, lanes: Lanes) -> None:
        """Write a register of these lanes; narrower values are extended by their own sign."""
        width = self.widths[register]
        if value.dtype.itemsize < width:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width}")
        if lanes is None:
            self.regs[register] = value
            return
        before = self.regs[register]
        if before is None:
            found = np.full(self.count, True if value.dtype.kind == "b" else 0x7B, value.dtype)
        elif before.dtype.itemsize == value.dtype.itemsize and before.dtype.kind != "b":
            found = np.array(np.broadcast_to(before.view(value.dtype), self.count))
        else:
            found = np.array(np.broadcast_to(before, self.count)).astype(value.dtype)
        found[lanes] = value
        self.regs[register] = found

    def of(self, array: Array, lanes: Lanes) -> Array:
        """An array of all lanes, cut to these."""
        return array if lanes is None else array[lanes]

    def passed(self, lanes: Lanes) -> None:
        """These lanes, whole blocks, have passed a barrier."""
        chosen = slice(None) if lanes is None else lanes
        self.barriers[chosen] += 1
        if self.order is not None:
            self.order.barrier(self.thread[chosen])

    def clock(self, lanes: Lanes) -> Clock:
        """Who these lanes are, for the checker of races."""
        arrays = (self.thread, self.barriers, self.syncs)
        return Clock(*(self.of(a, lanes) for a in arrays))

    def whole_warps(self, lanes: Lanes, mask: int, what: str) -> None:
        """Raise an Apart unless all lanes that `mask` names are here, in each warp that is."""
        if lanes is None:
            return
        here = np.zeros(self.count, bool)
        here[lanes] = True
        here = here.reshape(-1, 32)
        wanted = (mask >> np.arange(32) & 1).astype(bool)
        missing = here.any(1) & (here != wanted).any(1)
        if missing.any():
            warp = int(np.flatnonzero(missing)[0])
            thread = int(self.thread[32 * warp])
            raise Apart(
                f"{what} names lanes {mask & 0xFFFFFFFF:#x} of the warp of thread "
                f"{thread % self.threads} of block {thread // self.threads}, others came to it",
                lanes[~missing[lanes // 32]],
            )

    def window(self, space: str) -> int:
        """Where a space begins among generic addresses."""
        return {"shared": SHARED, "local": LOCAL}.get(space, 0)
