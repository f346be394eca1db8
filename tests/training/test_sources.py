"""Which files paths mean, and the documents in files of every kind."""

import gzip
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers.corpora import jsonl

from elmkernels.training.data import sources


def texts(path: Path, field: str = "text") -> list[bytes]:
    """Whole documents, put together from their pieces."""
    found, begun = [], b""
    for piece in sources.pieces(path, field):
        begun += piece.text
        if piece.last:
            found.append(begun)
            begun = b""
    assert begun == b""
    return found


def made(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return [folder / name for name in names]


def test_files_folders_and_globs_sorted_and_once(tmp_path):
    made(
        tmp_path, "b/2.txt", "a.txt", "b/c/1.txt", "b/.git/x.txt", "b/.x.txt", "b/pic.png", "d.xyz"
    )
    given = [f"{tmp_path}/b", f"{tmp_path}/*.txt", f"{tmp_path}/b/../a.txt", f"{tmp_path}/d.xyz"]
    found = sources.files("data.train", given)
    wanted = ["a.txt", "b/2.txt", "b/c/1.txt", "d.xyz"]
    assert found == [tmp_path / name for name in wanted]
    assert sources.files("data.train", given[::-1]) == found
    assert sources.files("data.train", [f"{tmp_path}/b/**/1.txt"]) == [tmp_path / "b/c/1.txt"]


def test_relative_paths_are_seen_from_here(tmp_path, monkeypatch):
    made(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)
    assert sources.files("data.train", ["a.txt", "."]) == [tmp_path / "a.txt"]


def test_the_json_of_a_bin_is_no_text(tmp_path):
    made(tmp_path, "a.bin", "a.json", "b.json")
    found = sources.files("data.train", [f"{tmp_path}/*"])
    assert [path.name for path in found] == ["a.bin", "b.json"]


@pytest.mark.parametrize("kind", ["device", "pipe", "link to nothing"])
def test_what_is_no_file_would_be_read_for_ever(tmp_path, kind):
    path = tmp_path / "texts/a.jsonl"
    made(tmp_path, "texts/b.txt")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "gone")
    with pytest.raises(ValueError, match=f"a.jsonl must be a file, got a .*{kind}"):
        sources.files("data.train", [f"{tmp_path}/texts"])


@pytest.mark.parametrize("given", ["gone.txt", "no*where", "empty", "stdlib/nothing", ""])
def test_paths_that_mean_nothing(tmp_path, given):
    (tmp_path / "empty").mkdir()
    given = given if given.startswith("stdlib") else str(tmp_path / given)
    with pytest.raises(FileNotFoundError, match="data.validation: .* is no file, folder or glob"):
        sources.files("data.validation", [given])


def test_the_standard_library_without_tests_and_what_was_installed():
    found = sources.files("data.train", ["stdlib"])
    root = Path(sysconfig.get_paths()["stdlib"])
    assert {root / "json/decoder.py", root / "abc.py"} <= set(found) and len(found) > 300
    parts = {part for path in found for part in path.relative_to(root).parts}
    assert not parts & {"site-packages", "test", "tests"}
    assert {path.suffix for path in found} == {".py"}
    inside = sources.files("data.train", ["stdlib/json", "stdlib/ab*.py"])
    assert root / "abc.py" in inside and root / "json/decoder.py" in inside
    assert set(inside) < set(found) and len(inside) < 10


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.JSONL.gz", "jsonl"),
        ("a.json.gz", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.bin", "bin"),
        ("a.txt.gz", "text"),
        ("a", "text"),
        ("a.json", "text"),
    ],
)
def test_kinds(name, kind):
    assert sources.kind(Path(name)) == kind


TEXT = "first line\nsätze\n\nlong " + "猫" * 30 + "\r\nend"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 22])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_is_one_document_however_it_is_read(tmp_path, monkeypatch, piece, name):
    monkeypatch.setattr(sources, "PIECE", piece)
    raw = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert texts(tmp_path / name) == [raw]
    found = list(sources.pieces(tmp_path / name, "text"))
    if piece >= 4:
        for part in found:
            part.text.decode()  # no character is cut in two
    assert found[-1].read == (tmp_path / name).stat().st_size


def test_text_is_cut_after_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 8)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    found = [piece.text for piece in sources.pieces(tmp_path / "a.txt", "text")]
    assert found == [b"one\ntwo\n", b"three\n", b"four\n"]


def test_an_empty_text_is_no_document(tmp_path):
    (tmp_path / "a.txt").touch()
    assert list(sources.pieces(tmp_path / "a.txt", "text")) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_lines_of_json(tmp_path, name):
    rows = {"body": "one\ntwo", "id": 1}, "", {"body": "猫"}, {"body": ""}, '{"body": "\\ud800"}'
    path = jsonl(tmp_path / name, *rows)
    assert texts(path, "body") == [b"one\ntwo", "猫".encode(), b"", b"?"]


def test_rows_of_parquet(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": [1, 2, 3], "body": ["one", "", "猫"]})
    pyarrow.parquet.write_table(table, path)
    assert texts(path, "body") == [b"one", b"", "猫".encode()]
    with pytest.raises(ValueError, match=r"a.parquet has no field text .*it has \['id', 'body'\]"):
        texts(path)
    with pytest.raises(ValueError, match="a.parquet, row 1: id must be a string, got int"):
        texts(path, "id")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="a.parquet is not a parquet file that can be read"):
        texts(path, "body")


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="a.parquet needs datasets: pip install datasets"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, "{"], "a.jsonl, line 2 is not valid JSON"),
        (["[" * 200_000], "a.jsonl, line 1 is not valid JSON"),
        (['{"text": ' + "9" * 5000 + "}"], "a.jsonl, line 1 is not valid JSON"),
        ([{"text": "a"}, "", {"txt": "b"}], r"a.jsonl, line 3 has no field text .*\['txt'\]"),
        ([["text"]], "a.jsonl, line 1 must be an object with the field text, got list"),
        ([{"text": None}], "a.jsonl, line 1: text must be a string, got NoneType"),
    ],
)
def test_bad_lines_name_file_line_and_field(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        texts(jsonl(tmp_path / "a.jsonl", *rows))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("damage", ["cut", "other", "changed"])
def test_damaged_compression(tmp_path, name, damage):
    path = jsonl(tmp_path / name, {"text": os.urandom(500).hex()})
    raw = path.read_bytes()
    middle = len(raw) // 2
    changed = raw[:middle] + bytes(byte ^ 0xFF for byte in raw[middle : middle + 9])
    found = {"cut": raw[:-12], "other": b"text", "changed": changed + raw[middle + 9 :]}
    path.write_bytes(found[damage])
    with pytest.raises(ValueError, match="a.(jsonl|txt).gz"):
        texts(path)
