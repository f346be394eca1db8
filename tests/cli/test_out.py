"""--out: tried before anything is measured, never a mixture, and no reason to lose what was."""

import errno
import json
import os
from pathlib import Path

import pytest
from helpers.commands import TINY, refusal

from elmkernels.cli import console
from elmkernels.cli.main import main
from elmkernels.testing import CASES
from elmkernels.weights import storage

MODEL = ["--checkpoint", str(TINY), "--device", "cpu"]
PARITY = ["parity", "attention", "--dtype", "fp32", "--backend", "sdpa", "--device", "cpu"]
COMMANDS = {
    "parity": PARITY,
    "bench ops": ["bench", "ops", "attention", "--quick", "--device", "cpu"],
    "bench generate": ["bench", "generate", "--checkpoint", str(TINY), "--quick"],
    "bench train": ["bench", "train", "--quick", "--device", "cpu"],
    "check": ["check", "--quick", *MODEL],
    "gpu-check": ["gpu-check", "--quick", "--device", "cpu"],
}


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in CASES:
        monkeypatch.setitem(CASES, op, CASES[op][:1])


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("elmkernels.cli.console.measure", measured)
    monkeypatch.setattr("elmkernels.cli.ops.measure", measured)


def fails(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "Permission denied"),
        (errno.ENOSPC, "No space left on device"),
        (errno.EROFS, "Read-only file system"),
    ],
)
@pytest.mark.usefixtures("nothing_is_measured")
def test_what_cannot_be_written_is_said_first(
    capsys, monkeypatch, tmp_path, command, number, words
):
    monkeypatch.setattr(Path, "write_bytes", fails(number))
    out = tmp_path / "a" / "b"
    text = refusal(capsys, *COMMANDS[command], "--out", str(out))
    assert text == f"elmkernels: error: --out: {out} can't be written to: {words}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("nothing_is_measured")
def test_what_is_no_folder(capsys, tmp_path, command):
    file = tmp_path / "file"
    file.write_text("any")
    text = refusal(capsys, *COMMANDS[command], "--out", str(file))
    assert text == f"elmkernels: error: --out must be a folder, got the file {file}\n"
    below = file / "out"
    text = refusal(capsys, *COMMANDS[command], "--out", str(below))
    assert text == f"elmkernels: error: --out: {below} can't be written to: Not a directory\n"
    assert file.read_text() == "any"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has such a folder")
def test_where_no_folder_can_be_made(capsys):
    text = refusal(capsys, *PARITY, "--out", "/proc/x/y")
    assert text == (
        "elmkernels: error: --out: /proc/x/y can't be written to: No such file or directory\n"
    )


@pytest.mark.parametrize("found", [*COMMANDS, "eval", "another program", "no JSON", "a list"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("nothing_is_measured")
def test_results_of_another_command_are_not_replaced(capsys, tmp_path, command, found):
    if found == command:
        pytest.skip("its own results are replaced")
    text = {"another program": '{"any": 1}', "no JSON": "{", "a list": "[]"}
    file = tmp_path / "results.json"
    file.write_text(text.get(found, json.dumps({"command": found})))
    before = file.read_text()
    said = refusal(capsys, *COMMANDS[command], "--out", str(tmp_path))
    assert f"--out: {file} has " in said and f"not of {command!r}: give another folder" in said
    assert (repr(found) in said) == (found not in text)
    assert file.read_text() == before and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.usefixtures("few_cases")
def test_the_same_command_again(capsys, tmp_path):
    for _ in range(2):
        assert main([*PARITY, "--out", str(tmp_path)]) == 0
        assert json.loads((tmp_path / "results.json").read_text())["command"] == "parity"


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("as_json", [False, True])
def test_a_disk_that_is_full_at_the_end_loses_no_figure(capsys, monkeypatch, tmp_path, as_json):
    monkeypatch.setattr(console, "replace_text", fails(errno.ENOSPC))
    out = tmp_path / "new"
    assert main([*PARITY, "--out", str(out), *(["--json"] if as_json else [])]) == 2
    captured = capsys.readouterr()
    if as_json:
        assert len(json.loads(captured.out)["records"]) == 1
    else:
        assert "parity: 1 records, 0 failed parity" in captured.out
    assert captured.err.splitlines()[-1] == "elmkernels: error: No space left on device"
    assert "wrote" not in captured.err and not out.exists()


def test_a_benchmark_goes_on_without_its_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(console, "replace_text", fails(errno.ENOSPC))
    monkeypatch.setattr(console.chart, "missing", lambda: "no charts")
    argv = [*COMMANDS["check"], "--dtype", "bf16", "--rounds", "1", "--out", str(tmp_path)]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "parity: ok" in captured.out and "accelerated is" in captured.out
    assert captured.err.splitlines()[-1] == "elmkernels: error: No space left on device"


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("there", [False, True])
def test_folders_that_were_made_for_nothing(tmp_path, depth, there):
    folder = tmp_path.joinpath(*"abc"[:depth])
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(OSError, match="any"), storage.made_folder(folder):
        assert folder.is_dir()
        raise OSError("any")
    assert folder.exists() == there
    with storage.made_folder(folder):
        pass
    assert folder.is_dir()
