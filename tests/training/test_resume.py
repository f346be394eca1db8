"""A run that stops and goes on is the run that never stopped; broken checkpoints are refused."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.runs import losses, same_weights, steps_of, train, weights, write_recipe

from elmkernels.cli.main import main
from elmkernels.training import state
from elmkernels.training.loop import Trainer

ALONE = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def step_folders(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def refusal(capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["train", *map(str, argv)]) == code
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert captured.out == "" and line.startswith("elmkernels: error: ")
    return line


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["true", "false"], ids=["accelerated", "eager"])
def test_to_the_bit(tmp_path, precision, kernels):
    recipe = write_recipe(tmp_path)
    how = ["--set", f"engine.precision={precision}", "--set", f"engine.kernels={kernels}"]
    whole = train(recipe, tmp_path / "whole", *how)
    train(recipe, tmp_path / "parts", *how, "--steps", "3")
    parts = train(recipe, tmp_path / "parts", *how, "--resume")
    assert list(whole) == list(range(1, 9)) and whole == parts
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert whole[8] < whole[1] - 0.5  # it learns
    assert steps_of(tmp_path / "parts", "resume") == [3]


def test_the_moments_go_on_too(tmp_path):
    """Weights alone would not give the same curve."""
    recipe = write_recipe(tmp_path)
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "final", "--steps", "4")
    change = ["--set", f"initial={tmp_path / 'final' / 'final'}"]
    other = train(recipe, tmp_path / "other", *change, "--steps", "4")
    assert list(other.values()) != [whole[s] for s in range(5, 9)]


def test_rotation_and_the_average(tmp_path):
    recipe = write_recipe(tmp_path)
    out = tmp_path / "out"
    train(recipe, out, "--set", "keep.checkpoint_every=1", "--set", "keep.checkpoints=2")
    assert step_folders(out) == ["step-00000007", "step-00000008"]
    train(recipe, tmp_path / "seven", "--steps", "7")
    before, last = weights(tmp_path / "seven"), weights(out)
    for name, mean in weights(out, "average").items():
        exact = (before[name].double() + last[name].double()) / 2
        assert torch.equal(mean, exact.float()), name


def test_no_checkpoints_when_none_are_wanted(tmp_path):
    recipe = write_recipe(tmp_path, keep={"checkpoint_every": 0})
    train(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "average").exists()


@ALONE
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_saves(tmp_path, monkeypatch, capsys, number, code):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    whole = train(recipe, tmp_path / "whole")
    step = Trainer.step

    def interrupted(self: Trainer):
        if self.done == 2:
            os.kill(os.getpid(), number)
        return step(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        train(recipe, out, code=code)
    assert signal.getsignal(number) is before
    assert step_folders(out) == ["step-00000003"] and not (out / "final").exists()
    assert f"stopped by {signal.Signals(number).name} after step 3" in capsys.readouterr().err
    assert train(recipe, out) == whole


def test_a_full_disk_leaves_what_was_there(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    whole = train(recipe, tmp_path / "whole")
    train(recipe, out, "--steps", "4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        line = refusal(capsys, recipe, "--out", out, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-00000008 can't be written" in line and os.strerror(errno.EFBIG) in line
    assert "that of step 4 stays the newest" in line
    assert step_folders(out) == ["step-00000004"]
    assert train(recipe, out) == whole
    assert same_weights(out, tmp_path / "whole")


def test_a_full_disk_at_the_end(tmp_path, capsys):
    """The model of an earlier end stays."""
    resource = pytest.importorskip("resource")
    recipe, out = write_recipe(tmp_path, keep={"checkpoint_every": 0}), tmp_path / "out"
    train(recipe, out, "--steps", "1")
    before = weights(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, what in ((20_000, "final"), (4_000, "train.jsonl")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            line = refusal(capsys, recipe, "--out", out, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"{out / what} can't be written: " in line and os.strerror(errno.EFBIG) in line
        assert all(torch.equal(before[name], weight) for name, weight in weights(out).items())
    assert not list(out.glob(".*"))


def test_killed_while_saving(tmp_path, monkeypatch):
    """What a killed save leaves is no checkpoint, and the next save removes it."""
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    whole = train(recipe, tmp_path / "whole")
    train(recipe, out, "--steps", "4")

    write = state.parts.write

    def killed(*args):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state.parts, "write", killed)
        train(recipe, out, code=130)
    assert step_folders(out) == [".step-00000008.partial", "step-00000004"]
    assert train(recipe, out) == whole
    assert step_folders(out) == ["step-00000004", "step-00000008"]


def test_broken_checkpoints_are_refused(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    whole = train(recipe, out)
    newest = out / "checkpoints" / "step-00000008"
    data = next(newest.glob("part-*"))
    content, facts = data.read_bytes(), (newest / state.FACTS).read_text()
    advice = "the newest whole one is of step 4: --from-step 4 goes on from it"

    def refused(*more: str) -> str:
        return refusal(capsys, recipe, "--out", out, "--set", "schedule.steps=9", *more)

    data.write_bytes(content[:-1])
    size = len(content)
    assert f"{data.name} must have {size} bytes, got {size - 1}; {advice}" in refused()
    data.unlink()
    assert f"{data.name} is missing; {advice}" in refused()
    data.write_bytes(content)
    (newest / state.FACTS).write_text(facts[:100])
    assert "is not valid JSON" in refused() and advice in refused()
    (newest / state.FACTS).write_text(json.dumps({**json.loads(facts), "form": 7}))
    assert "form must be 2, got 7" in refused()
    (newest / state.FACTS).unlink()
    assert state.FACTS in refused("--from-step", "8")
    assert train(recipe, out, "--from-step", "4") == whole
    assert state.newest_whole(out) == 8  # written anew
    assert "step-00000005 does not exist, there are steps 4, 8" in refused("--from-step", "5")


def test_another_model_or_other_data_are_refused(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    train(recipe, out, "--steps", "4")

    def refused(change: str) -> str:
        return refusal(capsys, recipe, "--out", out, "--set", change)

    assert "is of another model: head_dim must be 8, got 16; " in refused("model.head_dim=8")
    assert "norm_eps must be 1e-05, got 1e-06" in refused("model.norm_eps=1e-5")
    assert "seed was 0, is 1 (--fresh begins anew)" in refused("seed=1")
    assert "data.sequence_length was 64, is 32" in refused("data.sequence_length=32")
    held = tmp_path / "held"
    line = refused(f"data.train={held}")
    assert f"data.train was ['{tmp_path / 'train'}'], is ['{held}']" in line
    (tmp_path / "train" / "more.txt").write_text("more of it")
    assert "the corpus must be" in refused("seed=0")
    capsys.readouterr()
    train(recipe, out, "--set", "seed=1", "--fresh", "--steps", "1")
    assert f"an earlier run's files are in {out / 'earlier-1'} now" in capsys.readouterr().err
    assert step_folders(out / "earlier-1") == ["step-00000004"]
    assert list(losses(out)) == [1]


def test_other_changes_are_told(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    train(recipe, out, "--steps", "2")
    capsys.readouterr()
    changes = ("schedule.max_lr=1e-3", "optimizer.weight_decay=0.5", "batch.micro=4")
    options = [word for change in changes for word in ("--set", change)]
    train(recipe, out, *options, "--steps", "3")
    told = capsys.readouterr().err
    for line in (
        "schedule.max_lr was 0.003, is 0.001",
        "optimizer.weight_decay was 0.1, is 0.5",
        "batch.micro was 2, is 4",
    ):
        assert line in told


def test_the_optimisers_settings_are_the_recipes(tmp_path):
    """They lie in the checkpoint as well, from where they must not come back."""
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    train(recipe, out, "--steps", "2")
    train(recipe, tmp_path / "same", "--steps", "2")
    train(recipe, out, "--steps", "4", "--set", "optimizer.weight_decay=0.9")
    train(recipe, tmp_path / "same", "--steps", "4")
    assert not same_weights(out, tmp_path / "same")


def test_resume_needs_a_checkpoint(tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    line = refusal(capsys, recipe, "--out", out, "--resume")
    assert "checkpoints has no checkpoint to go on from" in line
    line = refusal(capsys, recipe, "--out", out, "--resume", "--fresh")
    assert "--fresh begins anew" in line
