"""The scheduler: which threads do what next.

Threads that stand at one instruction do it together. Of several groups the one furthest behind goes
first, so that those that parted meet again where their paths do, in a loop or after a branch. A
thread at a barrier waits for the others of its block; if nobody can go on, that is a Fault.
"""

import itertools
from collections.abc import Iterable

import numpy as np

from .faults import Fault
from .floats import Array
from .memory import TRACKED
from .program import Program, Step
from .races import Order, Shadow
from .state import Apart, Lanes, Launch, Restart, State
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
        self.polled = np.zeros(state.count, bool)
        self.spinning: dict[int, Lanes] = {}
        self.gathering: dict[int, tuple[Array, Fault]] = {}  # parts of warps, and what if it stays

    def run(self) -> bool:
        """Go on until all threads have ended, or those that could go on wait in a loop for what
        other blocks store. Raises a Fault that names the instruction.

        Returns:
            Whether all have ended.
        """
        for pc, lanes in self.spinning.items():
            self._add(pc, lanes)
        self.spinning = {}
        for turn in itertools.count():
            if not self.groups:
                break
            if turn == LONGEST:
                raise Fault("barrier", f"{LONGEST} branches, and threads still run")
            pc = min(self.groups)
            self._go(pc, self.groups.pop(pc))
        if self.spinning:
            return False
        for _, fault in self.gathering.values():
            raise fault
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
        return True

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
        steps, leaders = self.program.steps, self.program.leaders
        while True:
            if self.groups and pc in leaders:
                if pc in self.groups:
                    lanes = self._join(lanes, self.groups.pop(pc))
                if self.groups and min(self.groups) < pc:
                    self._add(pc, lanes)
                    return
            if pc in self.gathering:
                lanes = self._join(lanes, self.gathering.pop(pc)[0])
            try:
                found = self._step(steps[pc], pc, lanes)
            except Apart as apart:
                fault = apart.at(str(steps[pc].ins))
                if steps[pc].ins.guard is not None:
                    raise fault from None
                lanes = self._gather(pc, lanes, apart, fault)
                if not lanes.size:
                    return
                found = self._step(steps[pc], pc, lanes)
            except Fault as fault:
                raise fault.at(str(steps[pc].ins)) from None
            if not found[0]:
                return
            pc, lanes = pc + 1, found[1]

    def _step(self, step: Step, pc: int, lanes: Lanes) -> tuple[bool, Lanes]:
        """One instruction; whether any of these threads go on behind it, and which."""
        does, rest, some, others = self._guarded(step, lanes)
        if some and step.run is not None:
            step.run(self.state, does)
            if step.polls:
                self.polled[slice(None) if does is None else does] = True
        elif some:
            self._control(step, pc, does)
        if some and self.state.traffic is not None:
            size = self.state.count if does is None else does.size
            self.issued[pc] += -(-size // 32)
        return (True, lanes) if step.run is not None else (others, rest)

    def _gather(self, pc: int, lanes: Lanes, apart: Apart, fault: Fault) -> Array:
        """Parts of warps wait where they are for the rest; returns the whole ones."""
        own = self._lanes(lanes)
        self.gathering[pc] = (own[~np.isin(own, apart.ready)], fault)
        return apart.ready

    def _control(self, step: Step, pc: int, lanes: Lanes) -> None:
        if step.control == "bra":
            self._branch(step, pc, lanes)
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

    def _branch(self, step: Step, pc: int, lanes: Lanes) -> None:
        """Who loads in a loop what other blocks may store lets the others go on first."""
        own = self._lanes(lanes)
        if step.target <= pc and self.polled[own].any():
            polled = self.polled[own]
            self.polled[own] = False
            before = self.spinning.get(step.target, own[:0])
            self.spinning[step.target] = np.union1d(own[polled], self._lanes(before))
            lanes = own[~polled]
            if not lanes.size:
                return
        self._add(step.target, lanes)

    def _lanes(self, lanes: Lanes) -> Array:
        return self.state.lane if lanes is None else lanes

    def _wait(self, step: Step, pc: int, lanes: Lanes) -> None:
        """bar.sync: all threads of a warp come to it together, all of a block go on together."""
        if lanes is None:
            self.state.passed(None)
            self._add(pc + 1, None)
            return
        here: Array = np.zeros((self.state.count // 32, 32), bool)
        here[lanes // 32, lanes % 32] = True
        parts = np.any(here, axis=1) & np.any(~here & self.alive.reshape(-1, 32), axis=1)
        if np.any(parts):
            raise Apart("a barrier for a part of a warp", lanes[~np.repeat(parts, 32)[lanes]])
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
            if whole.any():
                self.state.passed(np.flatnonzero(whole[slots]))
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
    settings, blocks, threads = launch.settings, _order(launch), launch.threads
    units = launch.memory.bytes.size // program.global_unit
    order = Order(len(blocks), threads) if program.synchronizes else None
    shadow = Shadow(units, threads, order) if settings.races else None
    traffic = Traffic() if settings.traffic else None
    many = max(1, settings.lanes // threads)

    def runner(first: int) -> Runner:
        state = State(
            launch, blocks[first : first + many], program.function.registers, program.symbols,
            program.sizes(launch.shared), (program.unit, program.global_unit), shadow, traffic,
        )  # fmt: skip
        state.order = order
        return Runner(program, state)

    with np.errstate(all="ignore"):
        runners = (runner(first) for first in range(0, len(blocks), many))
        _in_turns(runners, launch)
    return traffic


def _in_turns(runners: Iterable[Runner], launch: Launch) -> None:
    """Some blocks after others; those that wait for others take turns until all have ended."""
    while waiting := [runner for runner in runners if not runner.run()]:
        before = launch.memory.changes
        rest = [runner for runner in waiting if not runner.run()]
        if len(rest) == len(waiting) and before == launch.memory.changes:
            pc = next(iter(rest[0].spinning))
            where = rest[0].program.steps[pc].ins
            raise Fault("barrier", f"blocks wait at {where} for what no other block will store")
        runners = rest
