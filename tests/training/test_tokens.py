"""Token files: what may lie in them, and what is said when it doesn't."""

import json
from pathlib import Path

import numpy as np
import pytest

from elmkernels.training.data.tokens import (
    Info,
    Part,
    Tokens,
    dtype_for,
    open_part,
    read_info,
    sidecar,
)

IDS = [5, 6, 2, 7, 2]


def write(path: Path, ids=IDS, stored="<u2", **info) -> Path:
    """A .bin, with its JSON where any of it is given."""
    np.array(ids, stored).tofile(path)
    if info:
        name = np.dtype(stored).name
        values = dict(
            dtype=name, vocab_size=10, eos=2, documents=2, tokens=len(ids), fingerprint="f"
        )
        sidecar(path).write_text(json.dumps({**values, **info}))
    return path


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_file_with_its_json(tmp_path, dtype):
    part = open_part(write(tmp_path / "a.bin", stored=dtype, eos=2), 10, 2)
    assert part.ids.tolist() == IDS and part.documents == 2
    assert isinstance(part.ids, np.memmap)


def test_a_file_alone_is_uint16(tmp_path):
    part = open_part(write(tmp_path / "a.bin", [1, 65535]), 65536, 2)
    assert part.ids.tolist() == [1, 65535] and part.documents is None


def test_an_empty_file_has_no_tokens(tmp_path):
    assert len(open_part(write(tmp_path / "a.bin", []), 10, 2).ids) == 0


def test_the_dtype_is_the_narrowest_that_holds_the_vocabulary():
    assert [dtype_for(n) for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_a_json_comes_back(tmp_path):
    info = Info("uint32", 100_000, 3, 4, 5, "abc")
    info.write(tmp_path / "a.json")
    assert read_info(tmp_path / "a.bin") == info
    assert read_info(tmp_path / "b.bin") is None


def test_several_files_are_read_as_one():
    ids = np.random.default_rng(0).integers(0, 100, 50).astype("<u2")
    cuts = [0, 7, 7, 8, 30, 50]  # one of them is empty
    pairs = zip(cuts[:-1], cuts[1:], strict=True)
    parts = [Part(Path(str(i)), ids[a:b], i) for i, (a, b) in enumerate(pairs)]
    tokens = Tokens(parts, 100, 2)
    assert len(tokens) == 50 and tokens.documents == 10
    for start in range(51):
        for stop in range(start, 51):
            found = tokens.read(start, stop)
            assert found.dtype == np.int64 and found.tolist() == ids[start:stop].tolist()
    assert Tokens([*parts, Part(Path("x"), ids, None)], 100, 2).documents is None
    with pytest.raises(ValueError, match=r"start, stop must be a range in \[0, 50\]"):
        tokens.read(40, 51)


@pytest.mark.parametrize(
    ("ids", "info", "message"),
    [
        ([5, 10, 2], {}, r"a.bin: ids must lie in \[0, 10\) .*got 10 at position 1"),
        (IDS, {"tokens": 6}, r"its length must be 6 tokens \(.*a.json\), got 5"),
        (IDS, {"eos": 3}, "a.json: eos must be the tokenizer's 2, got 3"),
        (IDS, {"eos": "2"}, "a.json: eos must be of type int, got '2'"),
        (IDS, {"dtype": "int64"}, "a.json: dtype must be uint16 or uint32, got 'int64'"),
    ],
)
def test_files_that_don_t_fit(tmp_path, ids, info, message):
    with pytest.raises(ValueError, match=message):
        open_part(write(tmp_path / "a.bin", ids, **info), 10, 2)


@pytest.mark.parametrize(("dtype", "odd"), [("<u2", 1), ("<u4", 2)])
def test_a_file_that_is_cut_inside_an_id(tmp_path, dtype, odd):
    path = write(tmp_path / "a.bin", stored=dtype, eos=2)
    path.write_bytes(path.read_bytes()[:-odd])
    with pytest.raises(ValueError, match="a.bin: its size must be a multiple of"):
        open_part(path, 10, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json is not valid JSON"),
        ("[]", "a.json must hold a JSON object, got list"),
        ('{"dtype": "uint16"}', "a.json lacks documents, eos"),
    ],
)
def test_a_damaged_json(tmp_path, text, message):
    path = write(tmp_path / "a.bin")
    sidecar(path).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_part(path, 10, 2)


def test_a_file_that_isn_t_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.bin does not exist"):
        open_part(tmp_path / "a.bin", 10, 2)
