"""The house rules of csrc/: short files, functions and lists of parameters, few files in a folder,
and names that mean one thing."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.is_file())
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS, MOST_FILES = 400, 80, 8, 16
CONTROL = {"if", "for", "while", "switch", "catch"}


class Function(NamedTuple):
    name: str
    lines: int
    parameters: int


def code_of(source: str) -> str:
    """A source without comments, literals and preprocessor, each line where it was."""
    source = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', source)
    source = re.sub(r"//[^\n]*", "", source)
    return re.sub(r"(?m)^#(?:.*\\\n)*.*$", lambda m: "\n" * m[0].count("\n"), source)


def closing(code: str, at: int, pair: str) -> int:
    """Where the bracket at `at` closes."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] == pair[0]) - (code[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"{pair} is open from line {code.count(chr(10), 0, at) + 1} on")


def counted(parameters: str) -> int:
    """How many parameters a list has: commas within brackets of any kind separate none."""
    while (
        flat := re.sub(r"<[^<>]*>|\([^()]*\)|\{[^{}]*\}|\[[^\[\]]*\]", "", parameters)
    ) != parameters:
        parameters = flat
    return len(parameters.split(",")) if parameters.strip() else 0


def functions(source: str) -> list[Function]:
    """Those of a source; lambdas are parts of the function that they are in."""
    code, found, at = code_of(source), [], 0
    while (brace := code.find("{", at)) >= 0:
        start = max(code.rfind(c, 0, brace) for c in ";{}") + 1
        attributes = r"__launch_bounds__\s*\([^()]*\)|\[\[[^\]]*\]\]"
        header = re.sub(attributes, "", code[start:brace])
        called = re.search(r"(operator\s*\(\)|operator\W+|~?\w+)\s*\(", header)
        at = brace + 1
        if called is None or called[1] in CONTROL or re.search(r"[=\[]", header[: called.start()]):
            continue
        end = closing(code, brace, "{}")
        opening = called.end() - 1
        inner = header[opening + 1 : closing(header, opening, "()")]
        first = start + len(code[start:brace]) - len(code[start:brace].lstrip())
        lines = code.count("\n", first, end) + 1
        found.append(Function(called[1], lines, counted(inner)))
        at = end
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_functions_are_found():
    source = """
// { not a function
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    first(const __grid_constant__ Step<A, B> step, int (&x)[4], Fn&& fn = Fn()) {
  if (x) { call([&](int a, int b, int c) { return "}"; }); }
}
struct S : Base {
  explicit S(int a, int b) : a(a), b(b) {
  }
  T* operator()(int64_t r) const { return first + r; }
  int values[2] = {1, 2};
};
template <class T>
[[gnu::noinline, gnu::noclone]] void last(T x, int y) {}
const auto lambda = [&](int a) { return a; };
"""
    assert functions(source) == [
        Function("first", 5, 3), Function("S", 2, 2), Function("operator()", 1, 1),
        Function("last", 2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MOST_LINES
    # An op's parameters are its schema's.
    ops = set(re.findall(r"TORCH_BOX\(&(\w+)\)", source))
    found = functions(source)
    assert [f for f in found if f.lines > MOST_FUNCTION_LINES] == []
    assert [f for f in found if f.parameters > MOST_PARAMETERS and f.name not in ops] == []


def test_no_folder_holds_many_files():
    counts = Counter(relative(path.parent) for path in SOURCES)
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes_are_named_from_csrc_on_and_each_header_is_guarded(path):
    source = path.read_text()
    for name in re.findall(r'^#include "(.+)"', source, re.MULTILINE):
        assert (CSRC / name).is_file(), name
        assert not name.startswith("cpu/") or "cpu" in path.parts, name
        assert not name.startswith("cuda/") or "cuda" in path.parts, name
    assert path.suffix in {".cpp", ".cu"} or "\n#pragma once\n" in source


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_packed_means_the_12_bit_form(path):
    found = re.findall(r"(?i)\w*pack(?:ed|ing|s)?(?![a-z])\w*", path.read_text())
    others = [word for word in found if not re.match(r"(?i)\w*packed12|unpack|_mm", word)]
    assert others == []
