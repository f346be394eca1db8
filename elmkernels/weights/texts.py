"""Texts that describe: JSON and YAML files, whose values anybody may have written.

What is read is a value of bounded depth and size, or a ValueError that names the file.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Objects within objects of a JSON file; checkpoints have three or four.
_DEEPEST = 32
# Values of a YAML file, aliases followed.
_MOST_VALUES = 100_000


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError for anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [x for value in level for x in _inside(value)]
    if level:
        raise ValueError(f"{file} must hold at most {_DEEPEST} objects within each other, got more")
    return values


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (x for pair in value.items() for x in pair)
    return value if isinstance(value, list | tuple | set) else ()


def read_yaml(file: Path) -> Any:
    """A YAML file's values. Raises ImportError without PyYAML, ValueError for invalid YAML."""
    return parse_yaml(file.read_bytes(), str(file))


def parse_yaml(text: str | bytes, origin: str) -> Any:
    """The values of a YAML text, which `origin` names in errors; raises as `read_yaml`."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"reading {origin} needs PyYAML: pip install pyyaml") from error
    try:
        values = yaml.safe_load(text)
    except Exception as error:  # `!!int x` and its like raise what the conversion met
        raise ValueError(f"{origin} is not valid YAML: {error or type(error).__name__}") from error
    # An alias costs nothing here, but as many values as its anchor wherever they are walked.
    count, left = 0, [values]
    while left:
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"{origin} must hold at most {_MOST_VALUES} values, got more")
        left += _inside(left.pop())
    return values


def is_plain_name(name: Any) -> bool:
    """Whether it names an entry of a folder, on any system, and nothing outside of it."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in "/\\:" or not c.isprintable() for c in name)
    )
