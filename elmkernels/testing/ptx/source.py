"""PTX text as data: modules, functions, instructions and their operands.

The parser knows the grammar, not the instructions: what an opcode means is in `alu`, `access`,
`warps` and `machine`. Scopes of inner braces may declare registers anew.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .faults import PtxError

BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4,
    "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8,
    "f64": 8, "pred": 1, "b128": 16,
}  # fmt: skip


class Reg(NamedTuple):
    """A register by its number; `negated` is a predicate's `!`."""

    number: int
    negated: bool = False


class Const(NamedTuple):
    """An immediate; floats as the bits that they were written in, with their size."""

    bits: int
    size: int = 0
    decimal: float | None = None


class Symbol(NamedTuple):
    """The name of a variable, a parameter, a function or a label."""

    name: str


class Mem(NamedTuple):
    """`[base + offset]`."""

    base: "Reg | Symbol | Const"
    offset: int


class Vec(NamedTuple):
    """`{a, b, ...}`; None is `_`, which is dropped."""

    items: tuple


class Tuple(NamedTuple):
    """`(a, b, ...)` of a call."""

    items: tuple


Operand = Reg | Const | Symbol | Mem | Vec | Tuple | None


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard op.suffix.suffix operands`."""

    op: str
    suffixes: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    text: str
    line: str

    @property
    def type(self) -> str:
        """The last suffix that is a type; "" if none is."""
        return next((s for s in reversed(self.suffixes) if s in BYTES), "")

    @property
    def names(self) -> set[str]:
        """What it names that is no register."""
        flat = [o.base if isinstance(o, Mem) else o for o in self.operands]
        return {o.name for o in flat if isinstance(o, Symbol)}

    @property
    def calls(self) -> tuple[str, ...]:
        """The function that it calls, if it is a call of one by its name."""
        if self.op != "call":
            return ()
        return tuple(o.name for o in self.operands if isinstance(o, Symbol))

    def __str__(self) -> str:
        return f"`{self.text}` ({self.line})" if self.line else f"`{self.text}`"


class Variable(NamedTuple):
    """A variable or a parameter: where it lies and how large it is."""

    name: str
    space: str
    offset: int
    size: int
    type: str
    init: tuple[int, ...] = ()


@dataclass
class Function:
    """A kernel or a device function."""

    name: str
    kernel: bool
    params: list[Variable]
    results: list[Variable]
    threads: int | None = None
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[tuple[str, str]] = field(default_factory=list)  # name, type
    variables: list[Variable] = field(default_factory=list)  # shared and local ones


@dataclass
class Module:
    """A file: its functions and its variables of module scope."""

    functions: dict[str, Function]
    variables: list[Variable]
    target: str

    @property
    def kernels(self) -> list[str]:
        return [name for name, f in self.functions.items() if f.kernel]


_NAME = r"[A-Za-z_$%][\w$%]*"
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(param|global|shared|local|const)\s+"
    r"((?:\.\w+(?:\s+\d+(?=\s))?\s+)*?)"
    rf"\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?({_NAME})\s*((?:\[\d*\])*)"
    r"(?:\s*=\s*\{([^}]*)\}|\s*=\s*([^;{]+))?"
)
_HEADER = re.compile(rf"\.(entry|func)\s*(\([^)]*\))?\s*({_NAME})\s*(\([^)]*\))?")
_FLOATS = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")


def _blank(text: str) -> str:
    """Without comments and debug sections."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text)


def _variable(text: str, offset: int) -> Variable:
    """One declaration, placed at the first aligned byte from `offset` on."""
    match = _VARIABLE.search(text.strip())
    if match is None:
        raise PtxError(f"a declaration isn't known: {text.strip()!r}")
    space, before, kind, name, sizes, many, one = match.groups()
    align = re.search(r"\.align\s+(\d+)", before)
    count = 1
    for size in re.findall(r"\[(\d*)\]", sizes):
        count *= int(size or 0)
    step = int(align[1]) if align else BYTES[kind]
    offset = -(-offset // step) * step
    values = [int(v, 0) for v in (many or one or "").split(",") if v.strip()]
    return Variable(name, space, offset, count * BYTES[kind], kind, tuple(values))


def _variables(text: str | None) -> list[Variable]:
    """The parameters in the parentheses of a header."""
    found: list[Variable] = []
    for part in (text or "()").strip()[1:-1].split(","):
        if part.strip():
            end = found[-1].offset + found[-1].size if found else 0
            found.append(_variable(part, end))
    return found


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a brace isn't closed")


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [p.strip() for p in (*parts, text[begin:]) if p.strip()]


class _Body:
    """The statements of one function's braces."""

    def __init__(self, function: Function, files: dict[str, str]):
        self.function, self.files = function, files
        self.scopes: list[dict[str, tuple[str, int]]] = [{}]
        self.numbers: dict[tuple[int, str], int] = {}
        self.ends = {"shared": 0, "local": 0, "param": 0}
        self.line = ""

    def parse(self, text: str) -> None:
        statement = re.compile(
            rf"\s*(?:(\.loc[^\n]*|\.file[^\n]*)\n|({_NAME})\s*:(?!:)|([{{}}])|([^;{{}}][^;]*);)"
        )
        text, place = text.rstrip(), 0
        while place < len(text):
            match = statement.match(text, place)
            if match is None:
                raise PtxError(f"a statement isn't known: {text[place : place + 60]!r}")
            place = match.end()
            note, label, brace, body = match.groups()
            if note:
                self._note(note)
            elif label:
                self.function.labels[label] = len(self.function.instructions)
            elif brace == "{":
                self.scopes.append({})
            elif brace:
                self.scopes.pop()
            else:
                self._statement(" ".join(body.split()))

    def _note(self, text: str) -> None:
        words = text.split()
        if words[0] == ".loc":
            name = self.files.get(words[1], words[1]).rpartition("/")[2]
            self.line = f"{name}:{words[2]}"

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            kind, names = text.removeprefix(".reg").strip()[1:].split(None, 1)
            for name in names.split(","):
                base, _, count = name.strip().partition("<")
                self.scopes[-1][base] = (kind, int(count[:-1]) if count else -1)
        elif text.startswith((".pragma", ".callprototype", ".branchtargets")):
            pass
        elif text.startswith("."):
            space = re.search(r"\.(shared|local|param)\b", text)
            if space is None:
                raise PtxError(f"a declaration isn't known: {text!r}")
            found = _variable(text, self.ends[space[1]])
            self.ends[space[1]] = found.offset + found.size
            self.function.variables.append(found)
        else:
            self._instruction(text)

    def _instruction(self, text: str) -> None:
        match = re.match(r"(?:@\s*(!?)\s*(\S+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if match is None:
            raise PtxError(f"an instruction isn't known: {text!r}")
        negated, guard, opcode, rest = match.groups()
        where = self._register(guard) if guard else None
        op, *suffixes = opcode.split(".")
        operands: list[Operand] = []
        for part in _split(rest):
            first, bar, second = part.partition("|")
            operands += [self._operand(first.strip()), *([self._operand(second)] if bar else [])]
        self.function.instructions.append(
            Instruction(
                op,
                tuple(suffixes),
                tuple(operands),
                where and Reg(where.number, bool(negated)),
                text,
                self.line,
            )  # fmt: skip
        )

    def _register(self, name: str) -> Reg:
        name = name.strip()
        for depth in range(len(self.scopes) - 1, -1, -1):
            base = name if name in self.scopes[depth] else name.rstrip("0123456789")
            if base in self.scopes[depth]:
                key = (id(self.scopes[depth]), name)
                if key not in self.numbers:
                    self.numbers[key] = len(self.function.registers)
                    self.function.registers.append((name, self.scopes[depth][base][0]))
                    self.keep = [*getattr(self, "keep", []), self.scopes[depth]]
                return Reg(self.numbers[key])
        if not name.startswith("%"):
            raise PtxError(f"a register isn't declared: {name}")
        key = (0, name)  # a special register
        if key not in self.numbers:
            self.numbers[key] = len(self.function.registers)
            self.function.registers.append((name, "special"))
        return Reg(self.numbers[key])

    def _declared(self, name: str) -> bool:
        return any(name in s or name.rstrip("0123456789") in s for s in self.scopes)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return None
        if text[0] in "{(":
            items = tuple(self._operand(part) for part in _split(text[1:-1]))
            return Vec(items) if text[0] == "{" else Tuple(items)
        if text[0] == "[":
            inner = text[1:-1].strip()
            match = re.fullmatch(r"([^\s+]+)\s*(?:\+\s*(-?\w+))?", inner)
            if match is None:
                raise PtxError(f"an address isn't known: {text}")
            base = self._operand(match[1])
            if not isinstance(base, Reg | Symbol | Const):
                raise PtxError(f"an address isn't known: {text}")
            return Mem(base, int(match[2], 0) if match[2] else 0)
        if text[0] == "!":
            return Reg(self._register(text[1:]).number, True)
        if text[0] == "%" or self._declared(text):
            return self._register(text)
        return constant(text) or Symbol(text)


def constant(text: str) -> Const | None:
    """An immediate, or None if it is none."""
    if match := _FLOATS.match(text):
        return Const(int(match[1] or match[2], 16), 4 if match[1] else 8)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Const(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", text):
        return Const(0, 0, float(text))
    return None


def _threads(header: str) -> int | None:
    """How many threads a block has, or may have at most, if the kernel says so."""
    bound = re.search(r"\.(?:reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)", header)
    return math.prod(int(n) for n in bound[1].split(",")) if bound else None


def parse(text: str, only: str | None = None) -> Module:
    """A PTX file.

    Args:
        text: what Triton or nvcc wrote.
        only: the kernel that is read, with the functions that it calls; None for all.

    Returns:
        The module.

    Raises:
        PtxError: something in it isn't known.

    Example:
        >>> parse(".version 8.0\\n.target sm_80\\n.visible .entry k() { ret; }").kernels
        ['k']
    """
    text = _blank(text)
    files = dict(re.findall(r"\.file\s+(\d+)\s+\"([^\"]*)\"", text))
    target = re.search(r"\.target\s+(\w+)", text)
    module = Module({}, [], target[1] if target else "")
    place, outside, bodies = 0, [], {}
    while match := _HEADER.search(text, place):
        outside.append(text[place : match.start()])
        kind, results, name, params = match.groups()
        brace, semicolon = text.find("{", match.end()), text.find(";", match.end())
        if brace < 0 or 0 <= semicolon < brace:  # a declaration
            place = semicolon + 1
            continue
        function = Function(name, kind == "entry", _variables(params), _variables(results))
        function.threads = _threads(text[match.end() : brace])
        place = _closing(text, brace) + 1
        bodies[name] = text[brace + 1 : place - 1]
        module.functions[name] = function
    names = [*bodies] if only is None else [only] if only in bodies else []
    for name in names:  # which grows by what is called
        _Body(module.functions[name], files).parse(bodies[name])
        called = {c for i in module.functions[name].instructions for c in i.calls}
        names += sorted(c for c in called if c in bodies and c not in names)
    module.functions = {name: module.functions[name] for name in bodies if name in names}
    outside.append(text[place:])
    end = {"shared": 0, "global": 0, "const": 0}
    for statement in "\n".join(outside).split(";"):
        if found := re.search(r"\.(global|shared|const)\s.*", statement, re.S):
            variable = _variable(found[0], end[found[1]])
            end[found[1]] = variable.offset + variable.size
            module.variables.append(variable)
    return module
