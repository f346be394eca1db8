"""From paths to tokens: filters, mixed sources, the cache, and what must not be left in it."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import EOS, as_bytes, changed, jsonl, recipe
from helpers.tokenizers import hugging_face

from elmkernels.training.data import prepare, sources
from elmkernels.training.data.sequences import Sequences
from elmkernels.training.data.tokens import Info, Tokens, read_info
from elmkernels.training.recipe import Recipe, load


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.txt").write_text("text, b")
    (folder / "a.txt").write_text("and a: sätze")
    jsonl(folder / "c.jsonl.gz", {"text": "line 1"}, {"text": ""}, {"text": "line 2"})
    return folder


CORPUS = as_bytes("and a: sätze", "text, b", "line 1", "line 2")


def prepared(tmp_path: Path, given: Recipe, split: str = "train", **options) -> Tokens:
    return prepare.prepare(given, tmp_path / "cache", split, **options)


def all_of(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


def test_documents_in_the_order_of_their_files_each_with_its_end(tmp_path, corpus):
    tokens = prepared(tmp_path, recipe(train=(str(corpus),)))
    assert all_of(tokens) == CORPUS
    assert (tokens.documents, tokens.eos, tokens.vocab_size) == (4, EOS, 257)
    assert tokens.parts[0].ids.dtype == np.uint16 and isinstance(tokens.parts[0].ids, np.memmap)
    other = recipe(train=tuple(str(p) for p in sorted(corpus.iterdir(), reverse=True)))
    assert all_of(prepared(tmp_path, other)) == CORPUS


def test_parquet_is_a_source_like_others(tmp_path, corpus):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), corpus / "aa.parquet")
    wanted = as_bytes("and a: sätze", "row", "text, b", "line 1", "line 2")
    assert all_of(prepared(tmp_path, recipe(train=(str(corpus),)))) == wanted


def test_a_split_without_paths_is_none(tmp_path, corpus):
    given = recipe(train=(str(corpus),))
    assert prepared(tmp_path, given, "validation") is None
    with pytest.raises(ValueError, match="split must be train or validation, got 'test'"):
        prepared(tmp_path, given, "test")


def test_train_never_holds_what_validation_does(tmp_path, corpus):
    given = recipe(train=(str(corpus),), validation=(f"{corpus}/?.txt",))
    assert all_of(prepared(tmp_path, given)) == as_bytes("line 1", "line 2")
    assert all_of(prepared(tmp_path, given, "validation")) == as_bytes("and a: sätze", "text, b")
    both = recipe(train=(f"{corpus}/*",), validation=(str(corpus),))
    with pytest.raises(ValueError, match="data.train must have files that data.validation has no"):
        prepared(tmp_path, both)


@pytest.mark.parametrize("piece", [1 << 22, 5, 1])
@pytest.mark.parametrize("at_once", [1 << 22, 1])
def test_short_documents_are_left_out(tmp_path, corpus, monkeypatch, piece, at_once):
    monkeypatch.setattr(sources, "PIECE", piece)
    monkeypatch.setattr(prepare, "_AT_ONCE", at_once)
    given = recipe(train=(str(corpus),))
    assert all_of(prepared(tmp_path, given)) == CORPUS
    seven = changed(given, min_characters=7)
    assert all_of(prepared(tmp_path, seven)) == as_bytes("and a: sätze", "text, b")
    # 12 characters are 13 bytes, and the end is a token too.
    for least, wanted in [(14, as_bytes("and a: sätze")), (8, as_bytes("and a: sätze", "text, b"))]:
        assert all_of(prepared(tmp_path, changed(given, min_tokens=least))) == wanted
    with pytest.raises(
        ValueError, match="data.train must be texts of .*min_tokens 15, got none in"
    ):
        prepared(tmp_path, changed(given, min_tokens=15))


def test_a_borrowed_tokenizer_begins_and_ends_documents(tmp_path, corpus):
    path = hugging_face(tmp_path)
    tokens = prepared(tmp_path, recipe(train=(f"{corpus}/*.gz",), tokenizer=str(path)))
    ids = all_of(tokens)
    assert [i for i, token in enumerate(ids) if token == 1] == [0, len(ids) // 2]
    assert [i + 1 for i, token in enumerate(ids) if token == 2] == [len(ids) // 2, len(ids)]
    assert tokens.eos == 2 and tokens.vocab_size == 290
    small = recipe(vocab_size=289, train=(str(corpus),), tokenizer=str(path))
    with pytest.raises(ValueError, match=r"data.tokenizer must be of at most 289 tokens .*got 290"):
        prepared(tmp_path, small)


def test_token_files_follow_the_texts(tmp_path, corpus):
    np.array([7, EOS], "<u2").tofile(corpus / "0.bin")
    np.array([8, 9, EOS], "<u4").tofile(corpus / "1.bin")
    Info("uint32", 257, EOS, 1, 3, "").write(corpus / "1.json")
    tokens = prepared(tmp_path, recipe(train=(str(corpus),)))
    assert all_of(tokens) == [*CORPUS, 7, EOS, 8, 9, EOS]


def test_token_files_alone_need_no_tokenizer_when_their_end_is_known(tmp_path):
    np.array([7, 290, 2], "<u2").tofile(tmp_path / "a.bin")
    given = recipe(train=(f"{tmp_path}/a.bin",), tokenizer="gone.json", eos=2)
    tokens = prepared(tmp_path, given)
    assert all_of(tokens) == [7, 290, 2] and tokens.eos == 2
    with pytest.raises(FileNotFoundError, match="gone.json"):
        prepared(tmp_path, changed(given, eos=None))
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 257\).*got 290"):
        prepared(tmp_path, changed(given, eos=None, tokenizer="bytes"))
    Info("uint16", 300, 2, 1, 3, "").write(tmp_path / "a.json")
    assert prepared(tmp_path, changed(given, eos=None)).eos == 2
    assert not (tmp_path / "cache").exists()


def test_text_is_tokenised_once(tmp_path, corpus, monkeypatch):
    given = recipe(train=(str(corpus),))
    first = prepared(tmp_path, given)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(before) == 2
    monkeypatch.setattr(sources, "pieces", None)  # what reads texts
    assert all_of(prepared(tmp_path, given)) == all_of(first)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_fingerprint_changes_with_all_that_tokens_depend_on(tmp_path, corpus):
    given = recipe(train=(str(corpus),))
    same = changed(given, sequence_length=8, separate_documents=False, train=(f"{corpus}/*",))
    others = [
        changed(given, min_characters=1),
        changed(given, min_tokens=1),
        changed(given, text_field="body"),
        changed(given, tokenizer=str(hugging_face(tmp_path))),
        changed(given, train=(f"{corpus}/*.txt",)),
    ]

    def key(one: Recipe) -> str:
        tokenizer = prepare.load_tokenizer(one.data.tokenizer)
        return prepare.fingerprint(one.data, sources.files("", one.data.train), tokenizer)

    first = key(given)
    assert key(same) == first
    os.utime(corpus / "a.txt", ns=(1, 1))
    touched = key(given)
    (corpus / "b.txt").write_text("text, bb")
    keys = [first, touched, key(given), *map(key, others)]
    assert len(set(keys)) == len(keys)


def test_changed_texts_are_tokenised_again(tmp_path, corpus):
    given = recipe(train=(str(corpus),))
    prepared(tmp_path, given)
    (corpus / "b.txt").write_text("other")
    wanted = as_bytes("and a: sätze", "other", "line 1", "line 2")
    assert all_of(prepared(tmp_path, given)) == wanted


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "_AT_ONCE", 1)
    given = recipe(train=(str(corpus),))

    def interrupt(done: int, total: int) -> None:
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".partial"]
        if done > 12:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepared(tmp_path, given, progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    assert all_of(prepared(tmp_path, given)) == CORPUS


def test_what_a_killed_run_left_is_neither_taken_nor_kept_forever(tmp_path, corpus):
    given = recipe(train=(str(corpus),))
    prepared(tmp_path, given)
    (whole,) = (tmp_path / "cache").glob("*.bin")
    raw = whole.read_bytes()
    whole.with_suffix(".json").unlink()  # killed between the two files
    whole.write_bytes(raw[:20])
    old, new = (whole.with_suffix(f".{pid}.partial") for pid in (1, 2))
    for partial in (old, new):
        partial.write_bytes(raw[:10])
    os.utime(old, (0, 0))
    assert all_of(prepared(tmp_path, given)) == CORPUS
    assert new.exists() and not old.exists()
    for damage in (raw[:-2], b""):
        whole.write_bytes(damage)
        assert all_of(prepared(tmp_path, given)) == CORPUS
    whole.with_suffix(".json").write_text("{")
    assert all_of(prepared(tmp_path, given)) == CORPUS


class FullDisk:
    """A file that takes some bytes and no more."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, raw: bytes) -> None:
        self.room -= len(raw)
        self.file.write(raw[: max(self.room, 0)])
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_the_old_cache_stays(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "_AT_ONCE", 1)
    given = recipe(train=(str(corpus),))
    prepared(tmp_path, given)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    (corpus / "d.txt").write_text("more")
    opened = Path.open

    def full(path: Path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        return FullDisk(file, 40) if path.suffix == ".partial" else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"tokens can't be written to .*/cache \(No space left"):
            prepared(tmp_path, given)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    assert all_of(prepared(tmp_path, given)) == [*CORPUS, *as_bytes("more")]


def test_a_cache_that_can_t_be_made(tmp_path, corpus):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="tokens can't be written to"):
        prepared(tmp_path, recipe(train=(str(corpus),)))


def test_a_source_that_can_t_be_read_is_no_full_disk(tmp_path, corpus):
    jsonl(corpus / "d.jsonl", "{")
    with pytest.raises(ValueError, match="d.jsonl, line 1 is not valid JSON"):
        prepared(tmp_path, recipe(train=(str(corpus),)))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_without_room_for_the_bytes(tmp_path, corpus):
    given = recipe(vocab_size=256, train=(str(corpus),))
    with pytest.raises(ValueError, match=r"data.tokenizer must be of at most 256 tokens .*got 257"):
        prepared(tmp_path, given)


def test_progress_goes_from_little_to_everything(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "_AT_ONCE", 1)
    seen: list[tuple[int, int]] = []
    given = recipe(train=(str(corpus),))
    prepared(tmp_path, given, progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert {total for _, total in seen} == {size}
    done = [done for done, _ in seen]
    assert done == sorted(done) and 0 < done[0] < done[-1] == size


def test_no_paths_and_paths_that_mean_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.train: .*gone is no file, folder or glob"):
        prepared(tmp_path, recipe(train=(f"{tmp_path}/gone",)))
    assert prepared(tmp_path, recipe()) is None


def test_the_tiny_recipe_s_data(tmp_path):
    """Python's own library, without what validation holds out."""
    tiny, _ = load("tiny")
    train, held = (prepare.prepare(tiny, tmp_path, split) for split in prepare.SPLITS)
    assert len(train) > 3_000_000 and len(held) > 200_000
    assert len(Sequences(train, tiny.data.sequence_length)) > 16 * 200
    assert train.documents > 300 and train.parts[0].documents == train.documents
    info = read_info(train.parts[0].path)
    assert (info.eos, info.vocab_size, info.tokens) == (256, 257, len(train))
    batch = Sequences(train, 256).batch(0, 16)
    assert batch.input_ids.shape == batch.targets.shape == (16, 256)
