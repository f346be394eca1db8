"""Every token of a model by its text: a SentencePiece model's, with what was added beside it."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..text.added import added_tokens
from ..text.metadata import parsed
from ..weights.storage import check_readable
from .config import OpenELMConfig

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0


class Piece(NamedTuple):
    """A token. kind: "NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED" or "BYTE"."""

    text: str
    score: float
    kind: str


class Vocabulary(NamedTuple):
    """pieces: one for each row of the embedding. unk, bos, eos: the SentencePiece model's own ids,
    -1 for none.
    """

    pieces: list[Piece]
    unk: int
    bos: int
    eos: int


def vocabulary_of(path: Path, config: OpenELMConfig) -> Vocabulary:
    """The tokens of a model by a SentencePiece file, and by the files of added tokens that lie
    beside it or came with the configuration. Raises ImportError, FileNotFoundError or ValueError.
    """
    try:
        import sentencepiece
    except ImportError as error:
        message = "tokenizers need sentencepiece: pip install sentencepiece (or elmkernels[gguf])"
        raise ImportError(message) from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    check_readable(path)
    found: Any = sentencepiece.SentencePieceProcessor()
    try:
        found.LoadFromFile(str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    count = found.vocab_size()
    if count > config.vocab_size:
        raise ValueError(
            f"{path} has {count} tokens, the model's vocab_size is {config.vocab_size}"
        )
    tests = (
        (found.IsUnknown, "UNKNOWN"),
        (found.IsControl, "CONTROL"),
        (found.IsUnused, "UNUSED"),
        (found.IsByte, "BYTE"),
    )
    pieces = [
        Piece(
            found.IdToPiece(i),
            found.GetScore(i),
            next((kind for is_, kind in tests if is_(i)), "NORMAL"),
        )
        for i in range(count)
    ]
    for i in range(count, config.vocab_size):  # rows of the embedding that no token has
        pieces.append(Piece(f"[PAD{i}]", UNUSED_SCORE, "UNUSED"))
    special = {config.bos_token_id, *config.eos_token_ids, config.pad_token_id}
    added = added_tokens(partial(file_beside, path.parent, config))
    for i, token in added.items():
        if i < len(pieces) and pieces[i].text != token.text:
            kind = "CONTROL" if token.special or i in special else "USER_DEFINED"
            pieces[i] = Piece(token.text, ADDED_SCORE, kind)
    return Vocabulary(pieces, found.unk_id(), found.bos_id(), found.eos_id())


def file_beside(folder: Path, config: OpenELMConfig, name: str) -> bytes | None:
    """A file beside a tokenizer, else the one that came with the configuration, if there is one."""
    path = folder / name
    return path.read_bytes() if path.is_file() else config.metadata.files.get(name)


def chat_template(folder: Path, config: OpenELMConfig) -> Any:
    """The template of a conversation, or a list of named ones; None if there is none."""
    if (data := file_beside(folder, config, "chat_template.jinja")) is not None:
        return data.decode("utf-8", "replace")
    data = file_beside(folder, config, "tokenizer_config.json")
    said = None if data is None else parsed("tokenizer_config.json", data).get("chat_template")
    if isinstance(said, str):
        return said
    named = [e for e in said if isinstance(e, Mapping)] if isinstance(said, list) else []
    return [e for e in named if isinstance(e.get("name"), str) and "template" in e] or None


def said_json(config: OpenELMConfig) -> dict[str, str]:
    """config.json and generation_config.json of a model as text, by their names."""
    found = {"config": json.dumps(config.to_hf_dict())}
    if generation := config.metadata.generation:
        found["generation_config"] = json.dumps(generation)
    return found
