"""The scheduler: which threads do what next.

Threads that stand at one instruction do it together. Of several groups the one furthest behind goes
first, so that those that parted meet again where their paths do, in a loop or after a branch. A
thread at a barrier waits for the others of its block; if nobody can go on, that is a Fault.
"""

import itertools

import numpy as np

from .faults import Fault
from .floats import Array
from .memory import TRACKED
from .program import Program, Step
from .races import Shadow
from .state import Lanes, Launch, Restart, State
from .traffic import Traffic

LONGEST = 1_000_000  # turns of groups, each up to a branch: more is a loop without an end


class Runner:
    """Some blocks of a launch, from their first instruction to the last."""

    def __init__(self, program: Program, state: State):
        self.program, self.state = program, state
        self.groups: dict[int, Lanes] = {0: None}
        self.alive = np.ones(state.count, bool)
        self.parked = np.full(state.count, -1)  # where a thread goes on after its barrier
        self.barrier = np.full(state.count, -1)
        self.issued = np.zeros(len(program.steps), np.int64)

    def run(self) -> None:
        """Raises a Fault that names the instruction."""
        for turn in itertools.count():
            if not self.groups:
                break
            if turn == LONGEST:
                raise Fault("barrier", f"{LONGEST} branches, and threads still run")
            pc = min(self.groups)
            self._go(pc, self.groups.pop(pc))
        waiting = self.parked >= 0
        if waiting.any():
            lane = int(np.flatnonzero(waiting)[0])
            step = self.program.steps[self.parked[lane] - 1]
            thread, threads = int(self.state.thread[lane]), self.state.threads
            same = waiting & (self.barrier == self.barrier[lane])
            count = int((self.state.slot[same] == self.state.slot[lane]).sum())
            raise Fault(
                "barrier",
                f"{count} of {threads} threads of block {thread // threads} wait for others at "
                f"{step.ins}, which wait elsewhere",
            )
        self._count()

    def _count(self) -> None:
        if self.state.traffic is not None:
            for step, count in zip(self.program.steps, self.issued, strict=True):
                if count:
                    self.state.traffic.issued[step.kind] += int(count)

    def _join(self, a: Lanes, b: Lanes) -> Lanes:
        if a is None or b is None:
            return None
        both = np.union1d(a, b)
        return None if both.size == self.state.count else both

    def _add(self, pc: int, lanes: Lanes) -> None:
        self.groups[pc] = self._join(self.groups[pc], lanes) if pc in self.groups else lanes

    def _guarded(self, step: Step, lanes: Lanes) -> tuple[Lanes, Lanes, bool, bool]:
        """Those that do a step, those that don't, and whether there are any."""
        guard = step.ins.guard
        if guard is None:
            return lanes, None, True, False
        told = self.state.regs[guard.number]
        if told is None:
            name = self.state.names[guard.number]
            raise Fault("register", f"{name} is read before it is written")
        if lanes is not None and told.size > 1:
            told = told[lanes]
        told = told ^ guard.negated
        if told.all():
            return lanes, None, True, False
        if not told.any():
            return None, lanes, False, True
        if lanes is None:
            return np.flatnonzero(told), np.flatnonzero(~told), True, True
        return lanes[told], lanes[~told], True, True

    def _go(self, pc: int, lanes: Lanes) -> None:
        """Threads that stand at one instruction, until others are behind them or meet them."""
        steps, leaders, state = self.program.steps, self.program.leaders, self.state
        while True:
            if self.groups and pc in leaders:
                if pc in self.groups:
                    lanes = self._join(lanes, self.groups.pop(pc))
                if self.groups and min(self.groups) < pc:
                    self._add(pc, lanes)
                    return
            step = steps[pc]
            try:
                does, rest, some, others = self._guarded(step, lanes)
                if some and state.traffic is not None:
                    size = state.count if does is None else does.size
                    self.issued[pc] += -(-size // 32)
                if step.run is not None:
                    if some:
                        step.run(state, does)
                    pc += 1
                    continue
                if some:
                    self._control(step, pc, does)
            except Fault as fault:
                raise fault.at(str(step.ins)) from None
            if not others:
                return
            pc, lanes = pc + 1, rest

    def _control(self, step: Step, pc: int, lanes: Lanes) -> None:
        if step.control == "bra":
            self._add(step.target, lanes)
        elif step.control == "bar":
            self._wait(step, pc, lanes)
        elif step.control == "trap":
            raise Fault("trap", "the kernel gives up")
        else:
            chosen = slice(None) if lanes is None else lanes
            if self.state.copies and any(np.isin(c[0], self._lanes(lanes)).any()
                                         for c in self.state.copies):  # fmt: skip
                raise Fault("barrier", "a thread ends before its asynchronous copies")
            self.alive[chosen] = False
            if (self.parked >= 0).any():
                self._release()

    def _lanes(self, lanes: Lanes) -> Array:
        return self.state.lane if lanes is None else lanes

    def _wait(self, step: Step, pc: int, lanes: Lanes) -> None:
        """bar.sync: all threads of a warp come to it together, all of a block go on together."""
        if lanes is None:
            self.state.barriers += 1
            self._add(pc + 1, None)
            return
        here = np.zeros(self.state.count, bool)
        here[lanes] = True
        warps = here.reshape(-1, 32)
        if (warps.any(1) & (~warps & self.alive.reshape(-1, 32)).any(1)).any():
            raise Fault("barrier", "a barrier for a part of a warp")
        self.parked[lanes], self.barrier[lanes] = pc + 1, step.target
        self._release()

    def _release(self) -> None:
        slots = self.state.slot
        blocks = self.state.count // self.state.threads
        alive = np.bincount(slots[self.alive], minlength=blocks)
        for number in np.unique(self.barrier[self.barrier >= 0]):
            waits = self.barrier == number
            whole = (np.bincount(slots[waits], minlength=blocks) == alive) & (alive > 0)
            go = waits & whole[slots]
            for pc in np.unique(self.parked[go]):
                lanes = np.flatnonzero(go & (self.parked == pc))
                self._add(int(pc), None if lanes.size == self.state.count else lanes)
            self.state.barriers[whole[slots]] += 1
            self.parked[go] = self.barrier[go] = -1


def _order(launch: Launch) -> list[int]:
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    order = launch.settings.order
    if order == "shuffled":
        return np.random.default_rng(0).permutation(blocks).tolist()
    if order not in ("forward", "backward"):
        raise ValueError(f"order must be forward, backward or shuffled, got {order!r}")
    return list(range(blocks))[:: -1 if order == "backward" else 1]


def execute(program: Program, launch: Launch) -> Traffic | None:
    """Run all blocks of a launch; memory is as they leave it.

    Args:
        program: the kernel.
        launch: its grid, parameters and memory.

    Returns:
        What it moved, if that was to be counted.

    Raises:
        Fault: it does what it must not.
        PtxError: it needs what the executor doesn't know.
    """
    if launch.threads % 32:
        raise ValueError(f"a block must have a multiple of 32 threads, got {launch.threads}")
    memory, begun = launch.memory, (launch.memory.bytes.copy(), launch.memory.marks.copy())
    stored: set[int] = set()
    while True:
        try:
            return _execute(program, launch)
        except Restart as restart:
            if restart.region in stored:
                raise RuntimeError(f"region {restart.region} is stored into untracked") from None
            stored.add(restart.region)
            memory.bytes[:], memory.marks[:] = begun
            for number in stored:
                region = memory.regions[number]
                memory.marks[region.begin : region.begin + region.size] |= TRACKED


def _execute(program: Program, launch: Launch) -> Traffic | None:
    settings, order = launch.settings, _order(launch)
    units = launch.memory.bytes.size // program.global_unit
    shadow = Shadow(units, launch.threads) if settings.races else None
    traffic = Traffic() if settings.traffic else None
    many = max(1, settings.lanes // launch.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(order), many):
            state = State(
                launch, order[first : first + many], program.function.registers, program.symbols,
                program.sizes(launch.shared), (program.unit, program.global_unit), shadow, traffic,
            )  # fmt: skip
            Runner(program, state).run()
    return traffic
