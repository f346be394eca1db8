"""A run's folder by anybody, or damaged: refused in a line, and nothing that it says is run."""

import errno
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.runs import ROOT, environment, same_weights, train, write_recipe
from safetensors.torch import load_file, save_file

from elmkernels import Plan
from elmkernels.cli.main import main
from elmkernels.training import state
from elmkernels.training.data.tokens import open_part
from elmkernels.training.journal import events
from elmkernels.training.lock import FILE, alone

MORE = ("--set", "schedule.steps=9")
REWRITTEN = object()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe, and the OUT of its eight steps."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder)
    train(recipe, folder / "out")
    return recipe, folder / "out"


@pytest.fixture
def copied(run, tmp_path) -> tuple[Path, Path]:
    """The same, to be damaged: OUT with its last checkpoint."""
    import shutil

    recipe, out = run
    last = tmp_path / "out" / "checkpoints" / "step-00000008"
    shutil.copytree(out / "checkpoints" / "step-00000008", last)
    return recipe, last


def refusal(capsys, recipe: Path, checkpoint: Path, *more: str) -> str:
    capsys.readouterr()
    out = checkpoint.parents[1]
    before = sorted(out.rglob("*"))
    assert main(["train", str(recipe), "--out", str(out), *MORE, *more]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert captured.out == "" and len(lines) == 1 and lines[0] == captured.err.splitlines()[-1]
    assert sorted(p for p in out.rglob("*") if "data" not in p.parts) == before
    return lines[0]


def rewrite(checkpoint: Path, **values) -> None:
    """Change facts as someone who knows the form would: with digests that fit."""
    file = checkpoint / state.FACTS
    facts = json.loads(file.read_text()) | values
    if values.get("files") is REWRITTEN:
        facts["files"] = {
            f.name: [f.stat().st_size, state.parts.digest(f)] for f in checkpoint.glob("part-*")
        }
    facts = {k: v for k, v in facts.items() if v is not None or k == "plan"}
    file.write_text(json.dumps({**facts, "sha256": state._digest_of(facts)}))


def test_every_flipped_bit_is_seen(copied):
    """In files and facts alike, wherever it is."""
    checkpoint = copied[1]
    chance = torch.Generator().manual_seed(0)
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        for at in torch.randint(0, 8 * len(whole), (150,), generator=chance).tolist():
            damaged = bytearray(whole)
            damaged[at // 8] ^= 1 << at % 8
            file.write_bytes(damaged)
            with pytest.raises(state.Broken):
                state.examine(checkpoint)
        file.write_bytes(whole)
    assert state.examine(checkpoint)["step"] == 8


FACTS = {
    "a step of another folder": dict(step=7),
    "a step that is text": dict(step="8"),
    "half a step": dict(step=8.0),
    "a step below 0": dict(step=-8),
    "a true step": dict(step=True),
    "a position that is none": dict(position=None),
    "a list of positions": dict(position=[64]),
    "a position beyond int64": dict(position=2**70),
    "no skipped": dict(skipped="no"),
    "a recipe that is text": dict(recipe="tiny"),
    "a configuration that is a list": dict(config=[]),
    "a plan of other fields": dict(plan={"rows": 1}),
    "a plan of numbers": dict(plan={"one_row": 1, "few_rows": 2, "many_rows": 3, "training": 4}),
    "a routine for other rows": dict(plan={**asdict(Plan()), "many_rows": "torch.mv"}),
    "a routine of no name": dict(plan={**asdict(Plan()), "training": "fast"}),
    "no random states": dict(random={}),
    "random numbers": dict(random={"cpu": 5}),
    "random text": dict(random={"cpu": "!!"}),
    "a random state that is short": dict(random={"cpu": "AAAA"}),
    "a random state of zeros": dict(random={"cpu": "A" * 6740 + "=="}),
    "no files": dict(files={}),
    "a file above": dict(files={"../part-00000.safetensors": [1, "0" * 64]}),
    "an absolute file": dict(files={"/etc/passwd": [1, "0" * 64]}),
    "a file of another kind": dict(files={".metadata": [1, "0" * 64]}),
    "a file without a digest": dict(files={"part-00000.safetensors": 7}),
    "tokens of another corpus": dict(tokens=5),
}


@pytest.mark.parametrize("facts", FACTS)
def test_facts_that_no_save_has_written(copied, capsys, facts):
    recipe, checkpoint = copied
    rewrite(checkpoint, **FACTS[facts])
    refusal(capsys, recipe, checkpoint)


def _state(change):
    def damage(checkpoint: Path) -> None:
        file = checkpoint / "part-00000.safetensors"
        tensors = {k: v.clone() for k, v in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return damage


NORM = "model.norm.weight"
MOMENT = "optimizer.norm.weight.exp_avg"
PARTS = {
    "no safetensors": lambda c: (c / "part-00000.safetensors").write_bytes(b"\x00" * 4096),
    "a tensor less": _state(lambda t: t.pop(NORM)),
    "a moment less": _state(lambda t: t.pop(MOMENT)),
    "a tensor more": _state(lambda t: t.update({"model.more": torch.ones(1)})),
    "a moment more": _state(lambda t: t.update({MOMENT + "_avg": torch.ones(1)})),
    "another shape": _state(lambda t: t.update({NORM: torch.ones(31)})),
    "a shape of more dimensions": _state(lambda t: t.update({NORM: torch.ones(32, 1)})),
    "a shape of none": _state(lambda t: t.update({NORM: torch.ones(())})),
    "another dtype": _state(lambda t: t.update({NORM: torch.ones(32, dtype=torch.float64)})),
    "integers": _state(lambda t: t.update({MOMENT: torch.ones(32, dtype=torch.int32)})),
    "a count of many": _state(lambda t: t.update({"optimizer.norm.weight.step": torch.ones(2)})),
    "a part too much": lambda c: save_file({NORM: torch.ones(32)}, c / "part-00001.safetensors"),
}


@pytest.mark.parametrize("parts", PARTS)
def test_parts_that_do_not_fit_the_model(copied, capsys, parts):
    """Whole by their digests, and yet another model's, or nobody's."""
    recipe, checkpoint = copied
    PARTS[parts](checkpoint)
    rewrite(checkpoint, files=REWRITTEN)
    assert "step-00000008" in refusal(capsys, recipe, checkpoint)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_of_pickles_is_refused_unread(copied, capsys, tmp_path):
    """What an earlier version wrote, whoever wrote it."""
    recipe, checkpoint = copied
    for name in (".metadata", "__0_0.distcp"):
        (checkpoint / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    facts = json.loads((checkpoint / state.FACTS).read_text())
    size = (checkpoint / ".metadata").stat().st_size
    files = {".metadata": size, "__0_0.distcp": size}
    (checkpoint / state.FACTS).write_text(json.dumps(facts | {"form": 1, "files": files}))
    assert "an earlier version's checkpoint" in refusal(capsys, recipe, checkpoint)
    rewrite(checkpoint, form=2, files={name: [size, "0" * 64] for name in files})
    assert "files must be as a save writes it" in refusal(capsys, recipe, checkpoint)
    assert not (tmp_path / "ran").exists()


def test_links_are_not_written_through(run, tmp_path, capsys):
    recipe, out = run[0], tmp_path / "out"
    out.mkdir()
    (tmp_path / "other").write_text("precious\nlast")
    for name in ("train.jsonl", FILE):
        (out / name).symlink_to(tmp_path / "other")
        assert main(["train", str(recipe), "--out", str(out), "--steps", "1"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("elmkernels: error: ")
        (out / name).unlink()
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / ".step-00000001.partial").symlink_to(tmp_path, True)
    train(recipe, out, "--steps", "1")
    assert (tmp_path / "other").read_text() == "precious\nlast"


@pytest.mark.parametrize(
    "text", ["x\n", "[1]\n", "{}\n", "[" * 200_000 + "\n", '{"event": "step"}\n', "\udc80\n", "5\n"]
)
def test_a_log_by_anybody(tmp_path, text):
    path = tmp_path / "train.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{path}"):
        events(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match=f"{path}"):
        events(path)


# Two runs.

HOLDS = """
import sys
from pathlib import Path
from elmkernels.training.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_second_run_is_refused_until_the_first_is_gone(run, tmp_path, capsys):
    recipe, out = run[0], tmp_path / "out"
    out.mkdir()
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(out)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        assert main(["train", str(recipe), "--out", str(out), "--fresh"]) == 2
        assert f"is of process {first.pid}" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [FILE]
    finally:
        first.kill()
        first.wait()
    assert (out / FILE).exists()  # stale
    train(recipe, out)
    assert not (out / FILE).exists()
    assert same_weights(out, run[1])


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone(tmp_path), alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_lock_within_one_process(tmp_path):
    with alone(tmp_path):
        with pytest.raises(ValueError, match=f"is of process {os.getpid()}"):
            with alone(tmp_path):
                raise AssertionError("both have it")
        assert (tmp_path / FILE).read_text() == f"{os.getpid()}\n"
    with alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["train.lock", "train.jsonl", "part-00000", "trainer.json"])
def test_a_full_disk_says_so(run, tmp_path, monkeypatch, capsys, where):
    """ENOSPC at any file that a run writes: one line, and what was there is whole."""
    recipe, out = run[0], tmp_path / "out"
    train(recipe, out, "--steps", "4")
    from elmkernels.training import journal, lock

    def full(*args, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "train.lock": (lock.os, "write"),
        "train.jsonl": (journal, "open"),
        "part-00000": (state.parts, "write_safetensors"),
        "trainer.json": (state, "write_json"),
    }[where]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(*place, full, raising=where != "train.jsonl")
        assert main(["train", str(recipe), "--out", str(out)]) in (1, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("elmkernels: error: ") and "No space left on device" in line
    assert "can't be written" in line and str(out) in line
    assert state.newest_whole(out) == 4
    train(recipe, out)
    assert same_weights(out, run[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": -1}, "tokens must be a count"),
        ({"eos": 1 << 80}, "eos must be a count, or an id"),
        ({"dtype": "uint64"}, "dtype must be uint16 or uint32"),
        ({"dtype": []}, "dtype must be of type str"),
        ({"documents": True}, "documents must be of type int"),
    ],
)
def test_a_token_file_described_by_anybody(tmp_path, values, message):
    import numpy as np

    path = tmp_path / "a.bin"
    np.arange(8, dtype="<u2").tofile(path)
    facts = {"dtype": "uint16", "vocab_size": 9, "eos": 0, "documents": 1, "tokens": 8}
    path.with_suffix(".json").write_text(json.dumps(facts | {"fingerprint": ""} | values))
    with pytest.raises(ValueError, match=message):
        open_part(path, 9, None)
