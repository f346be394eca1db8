"""The steps themselves: what they compute, what they log, and losses that aren't finite."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.runs import losses, same_weights, steps_of, train, weights, write_recipe
from torch.nn import functional as F

from elmkernels import OpenELM
from elmkernels.cli.main import main
from elmkernels.training import loop, recipe
from elmkernels.training.data import prepare
from elmkernels.training.data.sequences import Sequences
from elmkernels.training.journal import events
from elmkernels.training.loop import Trainer
from elmkernels.training.optim import learning_rate
from elmkernels.training.parallel import World

CPU = World(torch.device("cpu"))


def trainer_of(path: Path, **changes) -> Trainer:
    """A trainer of a recipe's file, with sections replaced."""
    found = replace(recipe.load(path)[0], **changes)
    tokens = prepare.prepare(found, path.parent / "data", "train")
    held = prepare.prepare(found, path.parent / "data", "validation")
    length = found.data.sequence_length
    return Trainer(
        found, path.parent / "out", CPU, Sequences(tokens, length), Sequences(held, length)
    )


def test_one_step_is_the_formula(tmp_path):
    """Loss, norm and update of one step, computed with plain torch over the whole batch."""
    path = write_recipe(tmp_path, loss={"z_loss": 1e-3, "label_smoothing": 0.1})
    trainer = trainer_of(path)
    settings = trainer.recipe
    model = OpenELM.from_config(trainer.config, seed=settings.seed)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = trainer.sequences.batch(0, settings.batch.sequences)
    logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).flatten(0, 1)
    targets = batch.targets.flatten()
    real = targets != -100
    loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
    loss = loss + 1e-3 * logits.logsumexp(-1)[real].square().mean()
    loss.backward()
    did = trainer.step()
    assert did.update and did.targets == int(real.sum())
    assert did.loss == pytest.approx(loss.item(), rel=1e-5)
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    assert did.norm == pytest.approx(norm, rel=1e-4) and norm > settings.optimizer.grad_clip
    assert did.lr == learning_rate(settings.schedule, 0)
    got = dict(trainer.model.named_parameters())
    for name, before in expected.items():
        decay = settings.optimizer.weight_decay if before.dim() > 1 else 0.0
        grad = grads[name] / norm
        # The first step of Adam, with both biases corrected.
        update = grad / (grad.abs() + settings.optimizer.eps)
        after = before * (1 - did.lr * decay) - did.lr * update
        moved = (got[name] - after).abs().max()
        assert moved <= 0.02 * did.lr, name


def test_micro_batches_change_nothing(tmp_path):
    path = write_recipe(tmp_path)
    curves = [
        train(path, tmp_path / f"m{micro}", "--set", f"batch.micro={micro}") for micro in (1, 4, 8)
    ]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_recomputed_activations_change_nothing(tmp_path):
    path = write_recipe(tmp_path)
    plain = train(path, tmp_path / "plain")
    for layers in ("true", "[1]"):
        how = ("--set", f"engine.checkpoint_activations={layers}")
        assert train(path, tmp_path / layers, *how) == pytest.approx(plain, rel=1e-6)


def test_the_log(tmp_path):
    path, out = write_recipe(tmp_path), tmp_path / "out"
    train(path, out)
    settings = recipe.load(path)[0]
    lines = events(out / "train.jsonl")
    assert lines[0]["event"] == "start" and lines[-1]["event"] == "end"
    steps = [line for line in lines if line["event"] == "step"]
    for i, line in enumerate(steps):
        assert line["step"] == i + 1 and line["tokens"] == (i + 1) * 8 * 64
        assert line["lr"] == learning_rate(settings.schedule, i)
        assert 0 < line["targets"] <= 8 * 64 and line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0 and line["mfu"] > 0 and line["seconds"] > 0
        assert line["peak_bytes"] is None or line["peak_bytes"] > 2**20
    assert steps_of(out, "saved") == steps_of(out, "evaluation") == [4, 8]


def test_log_every_and_never(tmp_path):
    path = write_recipe(tmp_path)
    seldom = train(path, tmp_path / "a", "--set", "keep.log_every=3")
    never = ("--set", "keep.log_every=0", "--set", "keep.evaluate_every=0")
    assert list(seldom) == [3, 6, 8]
    assert train(path, tmp_path / "b", *never) == {}
    assert steps_of(tmp_path / "b", "evaluation") == []
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_the_evaluation_is_plain_cross_entropy_of_the_first_sequences(tmp_path, capsys):
    path, out = write_recipe(tmp_path, loss={"z_loss": 0.5, "label_smoothing": 0.3}), tmp_path / "o"
    train(path, out, "--json")
    found = json.loads(capsys.readouterr().out)["evaluation"]
    settings = recipe.load(path)[0]
    held = Sequences(prepare.prepare(settings, out / "data", "validation"), 64, seed=None)
    model = OpenELM.from_pretrained(out / "final")
    batch = held.batch(0, 5)
    with torch.no_grad():
        logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).flatten(0, 1)
    expected = float(F.cross_entropy(logits, batch.targets.flatten()))
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["sequences"] == 5
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss NaN in these steps (counted from 1)."""
    inner = Trainer._loss

    def loss(self: Trainer, module, batch, plain):
        value = inner(self, module, batch, plain)
        return value * math.nan if not plain and self.done + 1 in steps else value

    monkeypatch.setattr(Trainer, "_loss", loss)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, capsys):
    path, out = write_recipe(tmp_path), tmp_path / "out"
    whole = train(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        poisoned(patch, 6)
        train(path, out, code=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("elmkernels: error: loss nan, gradient norm nan at step 6, rate 0.00")
    assert line.endswith("it was not made; the last checkpoint: step 4")
    assert steps_of(out, "skipped") == [6] and not (out / "final").exists()
    assert train(path, out) == whole  # nothing was spoilt


def test_a_rate_without_reason_ends_the_run(tmp_path, capsys):
    path = write_recipe(tmp_path, schedule={"max_lr": 1e30, "warmup_steps": 0})
    train(path, tmp_path / "out", code=1)
    assert "it was not made; there is no checkpoint" in capsys.readouterr().err


def test_or_leaves_the_update_out(tmp_path, monkeypatch, capsys):
    path, out = write_recipe(tmp_path, on_nan="skip"), tmp_path / "out"
    poisoned(monkeypatch, 3, 8)
    train(path, out, "--steps", "2")
    two = weights(out)
    train(path, out, "--steps", "3")
    assert all(torch.equal(weight, two[name]) for name, weight in weights(out).items())
    curve = train(path, out)
    assert [step for step, loss in curve.items() if math.isnan(loss)] == [3, 8]
    assert steps_of(out, "skipped") == [3, 8]
    captured = capsys.readouterr()
    assert "left out an update: loss nan" in captured.err
    assert "left out    2 updates" in captured.out
    assert curve[7] < curve[4] < curve[1]


def test_but_not_for_ever(tmp_path, monkeypatch, capsys):
    path = write_recipe(tmp_path, on_nan="skip")
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    poisoned(monkeypatch, *range(2, 9))
    train(path, tmp_path / "out", code=1)
    assert "at step 4" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "the update number 3 in a row" in line


def test_what_is_exported_generates(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    path, out = write_recipe(tmp_path, 20), tmp_path / "out"
    train(path, out)
    capsys.readouterr()
    for which in ("final", "average"):
        config = json.loads((out / which / "config.json").read_text())
        assert config["eos_token_id"] == 256
        argv = ["--checkpoint", str(out / which), "--prompt", "the model", "--device", "cpu"]
        assert main(["generate", *argv, "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out


def test_an_initial_checkpoint(tmp_path, capsys):
    path, out = write_recipe(tmp_path), tmp_path / "out"
    train(path, out)
    start = ("--set", f"initial={out / 'final'}", "--set", "schedule.warmup_steps=0")
    curve = train(path, tmp_path / "more", *start)
    assert curve[1] < losses(out)[1] - 0.5
    # By a file that is mapped: it must be as it was.
    assert same_weights(out, out)
    train(path, tmp_path / "none", "--set", "initial=/nowhere", code=2)
    assert "initial: /nowhere does not exist" in capsys.readouterr().err
