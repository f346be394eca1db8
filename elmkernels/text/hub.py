"""Checkpoints by their names on the Hugging Face Hub, if its cache on this machine holds them.

    CACHE/models--apple--OpenELM-270M/refs/main                the snapshot that is current
    CACHE/models--apple--OpenELM-270M/snapshots/SNAPSHOT/...   its files (links)

Nothing is downloaded. Where the cache is, huggingface_hub says if it is installed, else the
variables that it reads.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def cache_folder() -> Path:
    """Where the Hub's client keeps what it has fetched."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        pass
    else:
        return Path(HF_HUB_CACHE)
    given = os.environ.get("HF_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def snapshot(name: str, holds: Sequence[str]) -> Path | None:
    """The folder of a repository in the cache, None if there is none with such a file.

    Args:
        name: "owner/model".
        holds: files, of which one must be there: a repository may be fetched in part.
    """
    if not _NAME.fullmatch(name):
        return None
    repository = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs/main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    if not re.fullmatch(r"[\w.-]+", commit) or commit in (".", ".."):
        return None
    folder = repository / "snapshots" / commit
    return folder if any((folder / file).is_file() for file in holds) else None


def local_path(path: str | Path) -> Path:
    """A checkpoint that is here: the path itself, or the cache's folder for a name.

    Args:
        path: a path, or "owner/model".

    Returns:
        A path that exists.

    Raises:
        FileNotFoundError: there is neither, with the command that fetches it.
    """
    found = Path(path)
    if found.exists():
        return found
    name = str(path)
    if (cached := snapshot(name, WEIGHTS)) is not None:
        return cached
    text = f"{path} does not exist (a local folder or file; no download)"
    if _NAME.fullmatch(name):
        text += (
            f", nor does the Hub's cache {cache_folder()} hold it; as a model of the Hub it comes "
            f"by: hf download {name}"
        )
    raise FileNotFoundError(text)
