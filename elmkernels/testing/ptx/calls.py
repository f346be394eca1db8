"""Calls of functions, put in their place: a kernel becomes one list of instructions.

nvcc keeps some functions apart. None of them calls itself, so that each call can have a copy of the
function: registers and labels of its own, and its parameters in memory of the thread that calls.
"""

import dataclasses

from .faults import PtxError
from .source import (
    Const,
    Function,
    Instruction,
    Mem,
    Module,
    Operand,
    Reg,
    Symbol,
    Tuple,
    Variable,
    Vec,
)  # fmt: skip


class _Copy:
    """One function, or one call of one, on its way into a kernel.

    Args:
        into: the kernel.
        function: what is copied.
        name: what its labels and variables are called by.
        stack: the functions that are being copied.
    """

    def __init__(self, into: Function, function: Function, name: str, stack: tuple[str, ...]):
        if function.name in stack:
            raise PtxError(f"{function.name} calls itself")
        self.into, self.function, self.name = into, function, name
        self.stack = (*stack, function.name)
        self.first = len(into.registers)
        self.names: dict[str, str] = {label: f"{name}{label}" for label in function.labels}
        into.registers += function.registers
        into.variables += [self._own(v) for v in function.variables if v.space != "param"]

    @property
    def outermost(self) -> bool:
        return len(self.stack) == 1

    def _own(self, v: Variable) -> Variable:
        """Local memory is each call's own, shared memory that of all."""
        if v.space == "local":
            self.names[v.name] = f"{self.name}{v.name}"
        return v._replace(name=self.names.get(v.name, v.name))

    def _operand(self, operand: Operand) -> Operand:
        if isinstance(operand, Reg):
            return Reg(operand.number + self.first, operand.negated)
        if isinstance(operand, Symbol):
            return Symbol(self.names.get(operand.name, operand.name))
        if isinstance(operand, Mem):
            base = self._operand(operand.base)
            if isinstance(base, Reg | Symbol | Const):
                return Mem(base, operand.offset)
        if isinstance(operand, Vec | Tuple):
            return type(operand)(tuple(self._operand(o) for o in operand.items))
        return operand

    def _add(self, ins: Instruction) -> None:
        """An instruction with this copy's names; a parameter of a call is local memory."""
        operands = tuple(self._operand(o) for o in ins.operands)
        suffixes = ins.suffixes
        local = any(isinstance(o, Mem) and o.base in self.places for o in operands)
        if "param" in suffixes and local:
            suffixes = tuple("local" if s == "param" else s for s in suffixes)
        guard = ins.guard and Reg(ins.guard.number + self.first, ins.guard.negated)
        self.into.instructions.append(
            dataclasses.replace(ins, operands=operands, suffixes=suffixes, guard=guard)
        )

    def run(self, module: Module, places: set[Symbol]) -> None:
        """Copy all of it. `places` are the names of parameters that lie in local memory."""
        self.places = places
        labels: dict[int, list[str]] = {}
        for label, at in self.function.labels.items():
            labels.setdefault(at, []).append(label)
        calls = self._calls(module)
        end = f"{self.name}end"
        for at, ins in enumerate((*self.function.instructions, None)):
            for label in labels.get(at, ()):
                self.into.labels[self.names[label]] = len(self.into.instructions)
            if ins is None:
                break
            if at in calls:
                self.names.update(calls[at])
            if ins.calls:
                self._call(module, ins, at)
            elif ins.op == "ret" and not self.outermost:
                out = dataclasses.replace(ins, op="bra", operands=(Symbol(end),))
                self._add(out)
            else:
                self._add(ins)
        self.into.labels[end] = len(self.into.instructions)

    def _calls(self, module: Module) -> dict[int, dict[str, str]]:
        """What parameters of calls are called, by the instruction from which on they are: arguments
        before their call, results after it."""
        found, begin = {}, 0
        for at, ins in enumerate(self.function.instructions):
            if not ins.calls:
                continue
            results, arguments = self._matched(module, ins)
            for place, (given, variables) in ((begin, arguments), (at + 1, results)):
                for operand, v in zip(given, variables, strict=True):
                    own = f"{self.name}{at}.{v.name}"
                    found.setdefault(place, {})[operand.name] = own
                    self.places.add(Symbol(own))
            begin = at + 1
        return found

    def _matched(self, module: Module, ins: Instruction) -> list[tuple[tuple, list[Variable]]]:
        """The results and the arguments of a call, each with the function's own."""
        (name,) = ins.calls
        if name not in module.functions:
            raise PtxError(f"a function isn't known: {ins}")
        callee, lists = module.functions[name], [o for o in ins.operands if isinstance(o, Tuple)]
        ours = (callee.results, callee.params)
        if len(lists) != sum(map(bool, ours)):
            raise PtxError(f"a call isn't known: {ins}")
        return [(lists.pop(0).items if v else (), v) for v in ours]

    def _call(self, module: Module, ins: Instruction, at: int) -> None:
        callee = module.functions[ins.calls[0]]
        if ins.guard is not None:
            raise PtxError(f"a call under a condition isn't known: {ins}")
        copy = _Copy(self.into, callee, f"{self.name}{at}.", self.stack)
        for v in (*callee.results, *callee.params):
            copy.names[v.name] = f"{self.name}{at}.{v.name}"
            self.into.variables.append(v._replace(name=copy.names[v.name], space="local"))
        copy.run(module, self.places)


def flat(module: Module, name: str) -> Function:
    """A kernel without calls.

    Args:
        module: what `parse` gave.
        name: the kernel's.

    Returns:
        The kernel itself if it calls nothing, else one that has the functions in it.

    Raises:
        PtxError: a function calls itself, or isn't there.

    Example:
        >>> module = parse(".func f() { ret; } .visible .entry k() { call f; ret; }")
        >>> [i.op for i in flat(module, "k").instructions]
        ['bra', 'ret']
    """
    kernel = module.functions[name]
    if not any(ins.calls for ins in kernel.instructions):
        return kernel
    into = Function(kernel.name, True, kernel.params, kernel.results, kernel.threads)
    _Copy(into, kernel, "", ()).run(module, set())
    return into
