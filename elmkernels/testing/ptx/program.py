"""A kernel made ready: each instruction a function on the state, each label a number."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import access, warps
from .access import Run, space_of, strong
from .alu import DTYPES, Pure, pure, unknown
from .calls import flat
from .memory import LOCAL, PARAM, SHARED
from .source import BYTES, Const, Instruction, Module, Reg, Symbol, Vec
from .state import Lanes, State, source

# What has no effect that can be seen here.
SILENT = {"prefetch", "prefetchu", "discard", "griddepcontrol", "nop", "pmevent"}
TIME = {"nanosleep"}


@dataclass(frozen=True)
class Step:
    """One instruction: what it does, or how it leads elsewhere.

    `control` is "" or "bra", "exit", "bar", "trap"; `target` is where a branch leads, or the number
    of a barrier. `polls`: it loads what threads of other blocks may be waited for.
    """

    ins: Instruction
    run: Run | None
    control: str = ""
    target: int = 0
    kind: str = ""
    polls: bool = False


def _compute(ins: Instruction, p: Pure) -> Run:
    """An instruction that only computes."""
    operands = list(ins.operands)
    targets, operands = operands[: len(p.results)], operands[len(p.results) :]
    if len(operands) != len(p.sources):
        raise unknown(ins)
    sources = [source(o, kind) for o, kind in zip(operands, p.sources, strict=True)]
    dtypes = [DTYPES[kind] for kind in p.results]
    fn = p.fn

    def run(state: State, lanes: Lanes) -> None:
        found = fn(*[state.get(s, lanes) for s in sources])
        values = found if isinstance(found, tuple) else (found,)
        for target, value, dtype in zip(targets, values, dtypes, strict=True):
            if isinstance(target, Reg):
                if value.dtype != dtype:
                    value = value.astype(dtype)
                state.set(target.number, value, lanes)

    return run


def _move(ins: Instruction) -> Run:
    """mov: a value, a pack of {low, high} or the reverse, a variable's address."""
    target, value = ins.operands
    kind = "pred" if ins.type == "pred" else f"b{8 * BYTES[ins.type]}"
    if isinstance(target, Vec):
        size = BYTES[ins.type] // len(target.items)
        whole = source(value, kind)

        def unpack(state: State, lanes: Lanes) -> None:
            parts = np.ascontiguousarray(state.get(whole, lanes)).view(f"u{size}")
            for i, register in enumerate(target.items):
                if isinstance(register, Reg):
                    state.set(register.number, parts[i :: len(target.items)].copy(), lanes)

        return unpack
    if not isinstance(target, Reg):
        raise unknown(ins)
    if isinstance(value, Vec):
        size = BYTES[ins.type] // len(value.items)
        parts = [source(o, f"b{8 * size}") for o in value.items]

        def pack(state: State, lanes: Lanes) -> None:
            values = np.broadcast_arrays(*(state.get(s, lanes) for s in parts))
            packed = np.stack(values, 1).view(DTYPES[kind])
            state.set(target.number, packed.ravel(), lanes)

        return pack
    one = source(value, kind)

    def move(state: State, lanes: Lanes) -> None:
        if one.register >= 0 and state.regs[one.register] is None:
            return  # a way that has no value for it: who uses the target is a fault
        state.set(target.number, state.get(one, lanes).copy(), lanes)

    return move


def _cvta(ins: Instruction) -> Run:
    """cvta[.to].space: between an address in a window and a generic one."""
    target, value = ins.operands
    windows = {"shared": SHARED, "local": LOCAL, "param": PARAM}
    window = windows.get(access.space_of(ins), 0)
    if not isinstance(target, Reg):
        raise unknown(ins)
    step = np.uint64(window) if "to" not in ins.suffixes else np.uint64(-window % (1 << 64))
    one, number = source(value, "u64"), target.number

    def cvta(state: State, lanes: Lanes) -> None:
        state.set(number, state.get(one, lanes) + step, lanes)

    return cvta


def _policy(ins: Instruction) -> Run:
    """createpolicy: a hint to the cache, which is no part of what is executed."""
    target = ins.operands[0]
    if not isinstance(target, Reg):
        raise unknown(ins)
    return lambda state, lanes: state.set(target.number, np.zeros(1, np.uint64), lanes)


def _synchronizes(ins: Instruction) -> bool:
    """Whether it can order blocks: an atomic or a strong access that all of them see."""
    if space_of(ins) not in ("global", "") or "cta" in ins.suffixes:
        return False
    return ins.op in ("atom", "red") or (ins.op in ("ld", "st") and strong(ins.suffixes))


def _polls(ins: Instruction) -> bool:
    """Whether it reads what a thread may wait for in a loop."""
    wide = replace(ins, suffixes=tuple(s for s in ins.suffixes if s != "cta"))
    return ins.op in ("ld", "atom") and _synchronizes(wide)


def _fence(ins: Instruction) -> Run:
    """membar and fence: those for a block alone order no blocks."""
    wide = bool({"gl", "sys", "gpu", "cluster"} & set(ins.suffixes))

    def fence(state: State, lanes: Lanes) -> None:
        if wide and state.order is not None:
            state.order.fence(state.of(state.thread, lanes), state.of(state.barriers, lanes))

    return fence


def _nothing(state: State, lanes: Lanes) -> None:
    return None


_BUILDERS: dict[str, Callable[[Instruction], Run]] = {
    "ld": access.ld, "ldu": access.ld, "st": access.st, "ldmatrix": access.ldmatrix,
    "atom": access.atom, "red": access.atom, "shfl": warps.shfl, "vote": warps.vote,
    "redux": warps.redux, "mma": warps.mma, "mov": _move, "cvta": _cvta, "createpolicy": _policy,
    "membar": _fence, "fence": _fence,
}  # fmt: skip
CLASSES = {
    "ld": "load", "ldu": "load", "st": "store", "ldmatrix": "load", "cp": "copy", "shfl": "warp",
    "vote": "warp", "redux": "warp", "mma": "mma", "bra": "branch", "bar": "barrier",
    "barrier": "barrier", "mov": "move", "cvt": "convert", "cvta": "convert", "selp": "select",
    "setp": "compare", "atom": "atomic", "red": "atomic",
}  # fmt: skip


def _kind(ins: Instruction) -> str:
    if ins.op in CLASSES:
        return CLASSES[ins.op]
    if "approx" in ins.suffixes or ins.op in ("div", "sqrt", "rcp", "rem"):
        return "special"
    return "float" if "f" in ins.type else "integer"


class Program:
    """A kernel of a module.

    Args:
        module: what `parse` gave.
        name: the kernel's.
        share: of the error that PTX states, by which approximations are moved.

    Raises:
        PtxError: an instruction of it isn't known; it is named.

    Example:
        >>> Program(parse(".visible .entry k() { ret; }"), "k").steps[0].control
        'exit'
    """

    def __init__(self, module: Module, name: str, share: float = 0.0):
        if name not in module.functions:
            raise ValueError(f"name must be one of {', '.join(module.kernels)}, got {name!r}")
        self.module, self.function, self.share = module, flat(module, name), share
        self.params = {v.name: v for v in self.function.params}
        self.param_bytes = max((v.offset + v.size for v in self.function.params), default=0)
        self.symbols = {v.name: v.offset for v in self.function.params}
        self.static_shared, self.local = self._place()
        self.steps = [self._step(ins) for ins in self.function.instructions]
        self.steps.append(Step(Instruction("ret", (), (), None, "ret", ""), None, "exit"))
        after = {i + 1 for i, s in enumerate(self.steps) if s.control}
        self.leaders = {0, *self.function.labels.values(), *after}
        self.unit, self.global_unit = self._unit("shared"), self._unit("global")
        self.synchronizes = any(_synchronizes(s.ins) for s in self.steps)

    def _place(self) -> tuple[int, int]:
        """Addresses of shared and local variables; an unsized one begins behind all others."""
        used = {n for ins in self.function.instructions for n in ins.names}
        shared = [v for v in self.module.variables if v.name in used]
        shared += self.function.variables
        end, local = 0, 0
        for v in sorted((v for v in shared if v.space == "shared"), key=lambda v: v.size == 0):
            end = -(-end // 16) * 16
            self.symbols[v.name] = end
            end += v.size
        for v in self.function.variables:
            if v.space == "local":
                local = -(-local // 16) * 16
                self.symbols[v.name] = local
                local += v.size
        return end, local

    def _unit(self, space: str) -> int:
        """The smallest access of a space, which races are known by."""
        sizes = [
            4 if s.ins.op in ("cp", "ldmatrix") else BYTES.get(s.ins.type, 4)
            for s in self.steps
            if s.ins.op in ("ld", "st", "atom", "red") and access.space_of(s.ins) in (space, "")
        ]
        return min([4, *sizes])

    def _step(self, ins: Instruction) -> Step:
        kind = _kind(ins)
        if ins.op == "bra":
            target = ins.operands[0]
            if not isinstance(target, Symbol) or target.name not in self.function.labels:
                raise unknown(ins)
            return Step(ins, None, "bra", self.function.labels[target.name], kind)
        if ins.op in ("ret", "exit", "trap"):
            return Step(ins, None, "trap" if ins.op == "trap" else "exit", 0, kind)
        if ins.op in ("bar", "barrier"):
            if "warp" in ins.suffixes:
                return Step(ins, warps.warp_sync(ins), kind=kind)
            number = ins.operands[0]
            if "sync" not in ins.suffixes or not isinstance(number, Const):
                raise unknown(ins)
            if len(ins.operands) > 1:
                raise unknown(ins, "a barrier of some threads")
            return Step(ins, None, "bar", number.bits, kind)
        if ins.op in SILENT or ins.op in TIME:
            return Step(ins, _nothing, kind=kind)
        if ins.op == "cp" and ins.suffixes[0] == "async":
            return Step(ins, access.cp_async(ins), kind=kind)
        if ins.op == "ld" and access.space_of(ins) == "param":
            return Step(ins, access.ld_param(ins, self.params), kind=kind)
        if ins.op in _BUILDERS:
            return Step(ins, _BUILDERS[ins.op](ins), kind=kind, polls=_polls(ins))
        computed = pure(ins, self.share)
        if computed is None:
            raise unknown(ins, "the instruction")
        return Step(ins, _compute(ins, computed), kind=kind)

    def sizes(self, dynamic: int) -> tuple[int, int]:
        """Bytes of shared memory a block and of local memory a thread."""
        return self.static_shared + dynamic, self.local
