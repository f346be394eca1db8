"""docs/api.md: every public callable, from its signature and its Google-style docstring.

Signatures are read from the source, so that the page is the same under every version of Python.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import elmkernels
from elmkernels import backends, devices, evaluation, openelm, ops, testing
from elmkernels.bench import ops as bench
from elmkernels.compression import conversion

HEAD = """# API

Generated from the docstrings by `python -m docs.generate`. Every name is imported from the module
that its heading gives. Shapes are written `[batch, length]`; `...` stands for any dimensions.
"""

# Title, module, names. A name stands in the first section that has it.
SECTIONS: list[tuple[str, ModuleType, list[str]]] = [
    ("Models, acceleration, generation, compression", elmkernels,
     [name for name in elmkernels.__all__ if name not in ops.__all__]),
    ("Ops", elmkernels, ops.__all__),
    ("What acts on models, in parts", openelm, openelm.__all__),
    ("Results", conversion, ["Conversion"]),
    ("Evaluation", evaluation, evaluation.__all__),
    ("GGUF", openelm.gguf, ["export_gguf"]),
    ("Backends", backends, ["missing_kernels"]),
    ("Devices", devices, ["BackendChoice", "backend_choices"]),
    ("Parity", testing, testing.__all__),
    ("Benchmarks", bench, ["run_bench"]),
]  # fmt: skip

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE)
ITEM = re.compile(r"^([\w*][\w*, ]*): ")


@dataclass
class Doc:
    """A docstring in parts: its prose, and {"Args": text of the section}."""

    prose: str
    sections: dict[str, str] = field(default_factory=dict)

    def items(self, name: str) -> dict[str, str]:
        """{name: text} of a section of Args, Attributes or Raises."""
        found: dict[str, str] = {}
        last = ""
        for line in self.sections.get(name, "").splitlines():
            match = None if line.startswith(" ") else ITEM.match(line)
            if match:
                last = match[1]
                found[last] = line[match.end() :]
            elif last:
                found[last] += " " + line.strip()
        return found

    def named(self, name: str) -> set[str]:
        """The single names that a section's items are of."""
        return {part.strip() for key in self.items(name) for part in key.split(",")}


@dataclass
class Entry:
    """One public callable: its full name, the object, its docstring, and a class's members."""

    name: str
    value: Any
    doc: Doc
    members: list["Entry"] = field(default_factory=list)


def parsed(text: str | None) -> Doc:
    """A docstring's parts; Doc("") of none."""
    parts = SECTION.split(inspect.cleandoc(text or ""))
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return Doc(parts[0].strip(), {k: textwrap.dedent(v.strip("\n")).rstrip() for k, v in pairs})


def _members(name: str, kind: type) -> list[Entry]:
    """A class's own public methods and properties, in the order of the source."""
    found = []
    for key, value in vars(kind).items():
        plain = getattr(value, "__func__", value)
        if key.startswith("_") or key in inspect.get_annotations(kind):
            continue
        if not (inspect.isfunction(plain) or isinstance(value, property)):
            continue
        found.append(Entry(f"{name}.{key}", value, parsed(inspect.getdoc(value))))
    return found


def entries() -> list[tuple[str, list[Entry]]]:
    """(section, its callables) of all that is public; modules and tables are left out."""
    seen: set[int] = set()
    found: list[tuple[str, list[Entry]]] = []
    for title, module, names in SECTIONS:
        here = []
        for key in names:
            value = getattr(module, key)
            if id(value) in seen or not callable(value):
                continue
            seen.add(id(value))
            name = f"{module.__name__}.{key}"
            members = _members(name, value) if inspect.isclass(value) else []
            here.append(Entry(name, value, parsed(value.__doc__), members))
        found.append((title, here))
    return found


def _node(value: Any) -> Any:
    """The definition of a function or a class, as it is written."""
    plain = inspect.unwrap(getattr(value, "__func__", value))
    return ast.parse(textwrap.dedent(inspect.getsource(plain))).body[0]


def parameters(node: ast.FunctionDef) -> list[tuple[str, str]]:
    """(name, as it is written) of what a function takes, without self and cls; "*" is alone."""
    args, found = node.args, []
    gap = len(args.args) - len(args.defaults)
    for i, arg in enumerate(args.args):
        default = args.defaults[i - gap] if i >= gap else None
        found.append((arg.arg, _written(arg, default)))
    if args.vararg:
        found.append((args.vararg.arg, f"*{ast.unparse(args.vararg)}"))
    elif args.kwonlyargs:
        found.append(("*", "*"))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append((arg.arg, _written(arg, default)))
    if args.kwarg:
        found.append((args.kwarg.arg, f"**{ast.unparse(args.kwarg)}"))
    return found[1:] if found and found[0][0] in ("self", "cls") else found


def _written(arg: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(arg)
    if default is None:
        return text
    return (
        f"{text} = {ast.unparse(default)}" if arg.annotation else f"{text}={ast.unparse(default)}"
    )


def taken(entry: Entry) -> list[tuple[str, str]]:
    """What a callable takes: the parameters of a function, or of a class's constructor."""
    node = _node(entry.value)
    if isinstance(node, ast.FunctionDef):
        return parameters(node)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return parameters(statement)
    found = []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and "init=False" not in ast.unparse(statement):
            text = f"{ast.unparse(statement.target)}: {ast.unparse(statement.annotation)}"
            value = statement.value
            if isinstance(value, ast.Call):  # a field with a factory
                text += " = ..."
            elif value is not None:
                text += f" = {ast.unparse(value)}"
            found.append((ast.unparse(statement.target), text))
    return found


def returns(entry: Entry) -> str:
    """The annotation of what a function returns; "" for None and for classes."""
    node = _node(entry.value)
    if not isinstance(node, ast.FunctionDef) or node.returns is None:
        return ""
    text = ast.unparse(node.returns).strip("'")
    return "" if text == "None" else text


def _signature(entry: Entry, name: str) -> str:
    if inspect.isclass(entry.value) and issubclass(entry.value, Exception):
        return f"class {name}"
    head = f"class {name}" if inspect.isclass(entry.value) else name
    written, gives = [text for _, text in taken(entry)], returns(entry)
    tail = f" -> {gives}" if gives else ""
    line = f"{head}({', '.join(written)}){tail}"
    if len(line) <= 100:
        return line
    return f"{head}(\n" + "".join(f"    {text},\n" for text in written) + f"){tail}"


def _filled(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), 100, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _prose(text: str) -> str:
    """Paragraphs, filled; what is indented is a formula or a list and stays as it is."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        indented = paragraph.startswith("    ")
        found.append(
            f"```text\n{textwrap.dedent(paragraph)}\n```" if indented else _filled(paragraph)
        )
    return "\n\n".join(found)


def _list(title: str, items: dict[str, str]) -> str:
    lines = []
    for key, text in items.items():
        names = ", ".join(f"`{name.strip()}`" for name in key.split(","))
        lines.append(_filled(f"- {names}: {text}", "", "  "))
    return "\n".join([f"**{title}**", "", *lines])


def _described(doc: Doc) -> list[str]:
    """The parts of a docstring as Markdown."""
    found = [_prose(doc.prose)] if doc.prose else []
    for key, title in (("Args", "Arguments"), ("Attributes", "Attributes")):
        if items := doc.items(key):
            found.append(_list(title, items))
    if "Returns" in doc.sections:
        found.append(_filled(f"**Returns** {doc.sections['Returns']}"))
    if items := doc.items("Raises"):
        found.append(_list("Raises", items))
    if "Example" in doc.sections:
        found.append(f"```pycon\n{doc.sections['Example']}\n```")
    return found


def _member(entry: Entry, owner: str) -> str:
    """A method or a property of a class."""
    name = entry.name.removeprefix(f"{owner}.")
    parts = [f"#### {owner.rpartition('.')[2]}.{name}"]
    if not isinstance(entry.value, property):
        parts.append(f"```text\n{_signature(entry, name)}\n```")
    return "\n\n".join(parts + _described(entry.doc))


def page() -> str:
    """The whole page."""
    parts = [HEAD.rstrip()]
    for title, found in entries():
        parts.append(f"## {title}")
        for entry in found:
            parts.append(f"### {entry.name}")
            parts.append(f"```text\n{_signature(entry, entry.name.rpartition('.')[2])}\n```")
            parts += _described(entry.doc)
            parts += [_member(member, entry.name) for member in entry.members]
    return "\n\n".join(parts) + "\n"
