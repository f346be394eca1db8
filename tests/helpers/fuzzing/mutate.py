"""Damage to bytes, to JSON values and to texts, by chance that a seed decides."""

import copy
import json
import random
from typing import Any

_EDGES = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63)
_NUMBERS = (
    *_EDGES, *(-e for e in _EDGES), 10**18, 10**30, -(10**30), 10**400, 10**4000, 0.5, 1e308,
    -1e308, 1e-320,
)  # fmt: skip
_TEXTS = (
    "", " ", "x", "0", "true", "false", "null", "nan", "..", "../../etc/passwd", "/etc/passwd",
    "C:\\x", "a/b", "\x00", "\u202e", "\ud800", "é" * 50, "x" * 5000, "-1", "1e400", "\n\nerror: x",
    "config.json", "model.safetensors", "part-00000.safetensors", "F32", "BF16", "I32", "U8", "F4",
)  # fmt: skip
_DEEP: Any = []
for _ in range(60):
    _DEEP = [_DEEP]
_OTHERS = (
    None, True, False, [], {}, [None], [[]], {"a": {}}, [0] * 100, [1e308, 1e308], _DEEP,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def bytes_of(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """A few changes to bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not changed:
            return bytes(rng.randbytes(rng.randint(0, 64)))
        at = rng.randrange(len(changed))
        end = min(len(changed), at + rng.choice((1, 2, 4, 8, 16, 100)))
        how = rng.randrange(8)
        if how <= 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            changed[at:end] = rng.randbytes(end - at)
        elif how == 3:
            changed[at:end] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * (end - at)
        elif how == 4:
            del changed[at:]
        elif how == 5:
            del changed[at:end]
        elif how == 6:
            changed[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
        else:
            changed[at:at] = changed[at:end]
    return bytes(changed)


def value(rng: random.Random, old: Any = None) -> Any:
    """Another value in place of one."""
    how = rng.randrange(6)
    if isinstance(old, bool) or old is None or how == 0:
        pass
    elif isinstance(old, int | float) and how <= 3:
        try:
            return rng.choice((old + 1, old - 1, -old, old * 2, old // 2, old * 1000, old / 3))
        except (OverflowError, ValueError):
            return 0
    elif isinstance(old, list) and how <= 3:
        return rng.choice((old[:-1], old + old[:1], old[::-1], old * 2, old[0] if old else None))
    elif isinstance(old, str) and how <= 2:
        return rng.choice((old[:-1], old + "x", old.upper(), old[::-1], f"../{old}", f"/{old}"))
    return copy.deepcopy(rng.choice(rng.choice((_NUMBERS, _TEXTS, _OTHERS))))


def values(rng: random.Random, made: Any, most: int = 3) -> Any:
    """A copy of JSON values with a few of them replaced, left out or added."""
    made = copy.deepcopy(made)
    for _ in range(rng.randint(1, most)):
        if rng.random() < 0.02:
            made = value(rng, made)
        owners = list(_owners(made))
        if not owners:
            return made
        owner = rng.choice(owners)
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        how = rng.random()
        if not keys or how < 0.08:
            if isinstance(owner, dict):
                owner[str(value(rng, rng.choice(keys) if keys else None))[:99]] = value(rng)
            else:
                owner.append(value(rng))
        elif how < 0.16:
            del owner[rng.choice(keys)]
        else:
            key = rng.choice(keys)
            owner[key] = value(rng, owner[key])
    return made


def _owners(made: Any):
    """Every dict and list within, itself included."""
    if isinstance(made, dict | list):
        yield made
        for item in made.values() if isinstance(made, dict) else made:
            yield from _owners(item)


def dumped(made: Any) -> bytes:
    """JSON, halves of surrogate pairs included."""
    return json.dumps(made).encode("utf-8", "surrogatepass")


_YAML = (
    "!!python/object/apply:os.mkdir [{canary}]", "!!python/name:os.mkdir", "!!int x", "!!float ''",
    "!!timestamp x", "!!binary '...'", "!!bool x", "!!set {a, b}", "2001-99-99", "0x", "1_0:99",
    "&a [*a]", "*missing", "{[1]: 2}", "{a: 1, a: 2}", "<<: 5", "\t- x", "- [", "? x", "--- y",
    ".inf", "-.nan", "~", "'", "\x07", "1e9999", "0o99999999999999999999999", "9" * 5000,
    "[" * 3000, "&a [x, x, x, x, x, x, x, x, x, x]",
)  # fmt: skip
_BOMB = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)),
    ]
)


def yaml(rng: random.Random, text: str, canary: str) -> str:
    """A YAML text with a few lines or values changed."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        head, colon, rest = lines[at].partition(":")
        how = rng.randrange(9)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, rng.choice(lines))
        elif how == 2:
            lines[at] = "  " * rng.randint(0, 3) + lines[at].strip()
        elif how == 3:
            changed = bytes_of(rng, lines[at].encode())
            lines[at] = changed.decode("utf-8", "replace")
        elif how == 4:
            lines.insert(at, f"{head}: {rng.choice(_YAML).replace('{canary}', canary)}")
        elif how == 5 and rng.random() < 0.1:
            lines[at:at] = [*_BOMB.splitlines(), f"{head}: *a11"]
        elif colon:
            new = rng.choice(_YAML).replace("{canary}", canary)
            if rng.random() < 0.6:
                new = json.dumps(value(rng, _number(rest.strip())), ensure_ascii=False)
            lines[at] = f"{head}: {new}"
        if not lines:
            return ""
    return "\n".join(lines) + "\n"


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text
