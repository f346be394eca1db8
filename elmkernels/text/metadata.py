"""What a checkpoint says besides its shape and its weights: the ids that begin and end texts, every
other key of config.json, and the files that stand beside (tokenizers, generation_config.json, the
code that `auto_map` names). A configuration carries it, so that it is saved as it was loaded.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import fail, is_integer
from ..weights.storage import Folder, read_json

BOS, EOS = 1, 2  # Llama 2's tokenizer, which OpenELM has, where a checkpoint doesn't say
# Of the weights as they are stored: whoever stores them again says it anew.
_OF_WEIGHTS = {"torch_dtype", "dtype", "quantization", "quantization_config", "elmkernels"}
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_LARGEST = 256 << 20  # bytes of all such files
_DEEPEST = 64  # levels of lists and objects in a value


@dataclass(frozen=True)
class Metadata:
    """values: the keys of config.json, but those of the weights. files: what stands beside, by
    name. Raises TypeError or ValueError for ids that are none and numbers that aren't finite.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {key: value for key, value in self.values.items() if key not in _OF_WEIGHTS}
        object.__setattr__(self, "values", kept)
        _check_values(kept)
        token_ids(kept, self.generation)

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json says."""
        return self.json(GENERATION)

    def json(self, name: str) -> dict[str, Any]:
        """What a file beside says, {} if it isn't there."""
        return {} if name not in self.files else parsed(name, self.files[name])

    def without(self, names: Collection[str]) -> "Metadata":
        """The same without some of its files."""
        files = {name: data for name, data in self.files.items() if name not in names}
        return Metadata(self.values, files)

    def with_ids(self, ids: Mapping[str, Any]) -> "Metadata":
        """The same with other special tokens in config.json and generation_config.json, if they are
        others: an end that is one of several already leaves them.
        """
        ends = token_ids(self.values, self.generation)[1]
        known = {"eos_token_id"} if "eos_token_id" in self.values else set()
        new = {k: v for k, v in ids.items() if k not in known or v not in ends}
        generation = self.generation
        files = dict(self.files)
        if changed := {k: v for k, v in new.items() if k in generation}:
            files[GENERATION] = (json.dumps(generation | changed, indent=2) + "\n").encode()
        return Metadata({**self.values, **new}, files)


def parsed(name: str | Path, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(values).__name__}")
    return values


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a number that isn't finite, anywhere, and for what lies too deep."""
    left = [(key, value, 1) for key, value in values.items()]
    while left:
        key, value, depth = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            fail(key, "finite", value)
        if isinstance(value, Mapping):
            inner = [(f"{key}.{name}", held) for name, held in value.items()]
        elif isinstance(value, list | tuple):
            inner = [(f"{key}[{i}]", held) for i, held in enumerate(value)]
        else:
            continue
        if depth > _DEEPEST:
            fail(key[:80], f"at most {_DEEPEST} levels deep", "more")
        left += [(name, held, depth + 1) for name, held in inner]


def token_ids(
    values: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> tuple[int | None, list[int]]:
    """The id that a text begins with (None: none), and those that end it: what config.json's values
    say, and generation_config.json's of ends. Llama 2's where neither says anything.
    """
    (bos,) = _ids("bos_token_id", values.get("bos_token_id", BOS), several=False) or (None,)
    _ids("pad_token_id", values.get("pad_token_id"), several=False)
    said = [v["eos_token_id"] for v in (values, generation or {}) if "eos_token_id" in v]
    ends = [i for value in said or [EOS] for i in _ids("eos_token_id", value, several=True)]
    return bos, list(dict.fromkeys(ends))


def _ids(key: str, value: Any, *, several: bool) -> list[int]:
    """None and -1 are no id."""
    found = value if several and isinstance(value, list | tuple) else [value]
    for i in found:
        if i is not None and not (is_integer(i) and -1 <= i < 2**31):
            expected = "a token id, a list of them or null" if several else "a token id or null"
            fail(key, expected, repr(value), TypeError if not is_integer(i) else ValueError)
    return [int(i) for i in found if i is not None and i >= 0]


def files_beside(
    folder: Path, find: Callable[[str], Path | None], values: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of a checkpoint's folder that aren't its weights, by name. find: where one of a
    name is; values: of config.json, whose `auto_map` makes its code one of them.
    """
    names = [*TOKENIZERS, GENERATION]
    if values.get("auto_map"):
        names += sorted(path.name for path in folder.glob("*.py"))
    found = {}
    for name in names:
        path = find(name)
        if path is None:
            continue
        size = sum(map(len, found.values())) + path.stat().st_size
        if size > _LARGEST:
            raise ValueError(
                f"{path} and others beside the weights must be at most {_LARGEST} "
                f"bytes together, got {size}"
            )
        found[name] = path.read_bytes()
    return found


def raw_config(path: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as it stands there. Raises FileNotFoundError or
    ValueError.
    """
    file = Folder(Path(path)).find(CONFIG)
    if file is None:
        raise FileNotFoundError(f"{Path(path) / CONFIG} does not exist")
    return read_json(file)
