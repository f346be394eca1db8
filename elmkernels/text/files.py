"""Where a checkpoint's tokenizer lies, and which ids begin and end its texts."""

from pathlib import Path

from .hub import snapshot
from .metadata import GENERATION, parsed, raw_config, token_ids

FILES = ("tokenizer.json", "tokenizer.model")


def find_tokenizer(given: str | Path | None, checkpoint: str | Path | None) -> Path | None:
    """The tokenizer's file: `given` (a file, a folder that holds one of FILES, or a name that the
    Hub's cache knows), else the one beside the checkpoint, else None. Raises FileNotFoundError
    where `given` has none.
    """
    if given is not None:
        given = Path(given)
        if not given.exists():
            given = snapshot(str(given), FILES) or given
        found = given if given.is_file() else _inside(given)
        if found is None:
            raise FileNotFoundError(
                f"tokenizer must be a file or a folder with {' or '.join(FILES)}, got {given}"
            )
        return found
    if checkpoint is None:
        return None
    checkpoint = Path(checkpoint)
    return _inside(checkpoint if checkpoint.is_dir() else checkpoint.parent)


def _inside(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def special_tokens(checkpoint: str | Path | None) -> tuple[int | None, list[int]]:
    """The id that a text begins with, None for none, and those that end it, as the folder of a
    checkpoint says; Llama 2's where there is none, or it doesn't say.
    """
    if checkpoint is None or not Path(checkpoint).is_dir():
        return token_ids({})
    file = Path(checkpoint) / GENERATION
    generation = parsed(file, file.read_bytes()) if file.is_file() else {}
    return token_ids(raw_config(checkpoint), generation)
