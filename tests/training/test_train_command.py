"""`elmkernels train`: wrong input, ready recipes, what it prints and writes."""

import json
import sys

import pytest
import torch
from helpers.runs import WORDS, train, write_recipe

from elmkernels.bench import chart
from elmkernels.cli.main import main
from elmkernels.cli.train import read
from elmkernels.training import compare
from elmkernels.training.journal import Journal, curve, events


def refusal(capsys: pytest.CaptureFixture, *argv: str) -> str:
    capsys.readouterr()
    assert main(["train", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error: " in line]
    assert captured.out == "" and len(errors) == 1 and errors[0] == captured.err.splitlines()[-1]
    return errors[0]


def test_wrong_input(capsys, tmp_path):
    path = write_recipe(tmp_path)
    out = ["--out", tmp_path / "out"]
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text(" ".join(WORDS[:3]))
    (tmp_path / "bad.yaml").write_text("data: [")
    for argv, message in (
        ([], "CONFIG"),
        (["nowhere.yaml", *out], "nowhere.yaml is neither a file nor one of OpenELM-1_1B"),
        ([tmp_path / "bad.yaml", *out], "bad.yaml is not valid YAML"),
        ([path, "--out", tmp_path / "file"], "out must be a folder, got the file"),
        ([path, *out, "--set", "seed"], "--set must be SECTION.FIELD=VALUE, got 'seed'"),
        ([path, *out, "--set", "seed=x"], "--set: seed must be an integer, got 'x' (str)"),
        ([path, *out, "--set", "seed={"], "--set seed={: the value must be YAML"),
        ([path, *out, "--set", "seed.more=1"], "seed must be an integer"),
        ([path, *out, "--set", "engine.speed=9"], "section engine has no field speed"),
        ([path, *out, "--set", "model.layers=9"], "section model has no field layers"),
        ([path, *out, "--set", "engine.kernels=gpu"], "'gpu'"),
        ([path, *out, "--set", "engine.kernels=cuda"], "one of avx512_bf16, avx512_amx, avx512"),
        ([path, *out, "--set", "data.train=[]"], "data.train must be one path or more, got none"),
        ([path, *out, "--set", "data.train=/no"], "data.train: /no is no file, folder or glob"),
        ([path, *out, "--set", f"data.train={tmp_path}/short"], "at least 65 tokens"),
        ([path, *out, "--steps", "0"], "must be a positive integer, got '0'"),
        ([path, *out, "--from-step", "4"], "step-00000004 does not exist, there are none"),
        ([path, *out, "--device", "tpu"], "device must be"),
        ([path, *out, "--dtype", "bf16"], "unrecognized arguments: --dtype bf16"),
        ([path, *out, "--compare", "--fresh"], "--compare always begins anew"),
    ):
        assert message in refusal(capsys, *argv), argv


def test_replaced_fields():
    found, _ = read("tiny", ["seed=3", "optimizer.eps=1e-6", "model.head_dim=16", "on_nan=skip"])
    assert (found.seed, found.optimizer.eps, found.on_nan) == (3, 1e-6, "skip")
    assert found.model["head_dim"] == 16 and found.model["model_dim"] == 128
    found, _ = read("OpenELM-270M", ["model.vocab_size=40000"])
    assert found.model["vocab_size"] == 40000
    assert read("OpenELM-270M", ["model=OpenELM-450M"])[0].model == "OpenELM-450M"


@pytest.mark.parametrize(
    "change",
    ["engine.kernels=nope", "engine.kernels=cuda", "engine.kernels=sdpa", "data.tokenizer=nowhere",
     "data.train=/no", "data.train=[]", "data.eos=999", "initial=nowhere"],
)  # fmt: skip
def test_a_refusal_leaves_no_folder(capsys, tmp_path, change):
    path, out = write_recipe(tmp_path), tmp_path / "runs" / "x"
    argv = ["train", str(path), "--out", str(out), "--device", "cpu", "--set", change]
    assert main(argv) == 2
    assert capsys.readouterr().out == ""
    assert not out.parent.exists()


def test_without_compiled_kernels_it_says_so(capsys, monkeypatch, tmp_path):
    said = "no compiled kernels: any reason"
    monkeypatch.setattr("elmkernels.acceleration.swap.missing_kernels", lambda device: said)
    path = write_recipe(tmp_path)
    train(path, tmp_path / "out", "--device", "cpu", "--steps", "1")
    assert f"elmkernels: {said}" in capsys.readouterr().err.splitlines()


def test_what_it_prints(capsys, tmp_path):
    path = write_recipe(tmp_path)
    train(path, tmp_path / "out", "--device", "cpu")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "step 8 of 8, 4,096 tokens"
    starts = ["loss", "evaluation", "tokens/s", "log", "checkpoint", "final", "average"]
    assert [line.split()[0] for line in lines[1:]] == starts
    assert "step 8/8: loss " in captured.err and " tokens/s, MFU " in captured.err
    train(path, tmp_path / "out", "--json")  # there is nothing left to do
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 8 and found["loss"] is None
    assert found["averaged"] == ["step-00000004", "step-00000008"]


def test_a_default_place(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path), "--steps", "1"]) == 0
    assert (tmp_path / "runs" / "recipe" / "final" / "model.safetensors").is_file()


def test_tensorboard(tmp_path, monkeypatch, capsys):
    path = write_recipe(tmp_path, keep={"tensorboard": True})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        line = refusal(capsys, path, "--out", tmp_path / "none")
        assert "keep.tensorboard needs tensorboard: pip install 'elmkernels[tensorboard]'" in line
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = train(path, tmp_path / "out")
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    points = {event.step: event.value for event in board.Scalars("step/loss")}
    assert points == pytest.approx(expected, rel=1e-6)
    assert len(board.Scalars("evaluation/loss")) == 2


def test_a_torn_line_of_the_log(tmp_path):
    journal = Journal(tmp_path, 3)
    journal.event("step", 1, loss=2.5)
    journal.event("step", 2, loss=float("nan"))
    journal.close()
    with open(journal.path, "a") as file:
        file.write('{"event": "step", "st')
    assert [line["step"] for line in events(journal.path)] == [1, 2]
    again = Journal(tmp_path, 3)
    again.event("step", 2, loss=1.5)
    again.close()
    assert curve(journal.path) == {1: 2.5, 2: 1.5}


def test_a_comparison(tmp_path, capsys):
    path, out = write_recipe(tmp_path, 6), tmp_path / "out"
    assert main(["train", str(path), "--compare", "--out", str(out)]) == 0
    assert "fp32: ok" in (said := capsys.readouterr().out) and "bf16: ok" in said
    found = json.loads((out / "results.json").read_text())
    assert found["complete"] and found["steps"] == 6
    assert {name: len(p["runs"]) for name, p in found["precisions"].items()} == {
        "fp32": 3,
        "bf16": 5,
    }
    fp32 = found["precisions"]["fp32"]
    assert 0 < fp32["largest_difference"] < 1e-4 and len(fp32["runs"]["accelerated"]["loss"]) == 6
    if chart.missing() is None:
        assert (out / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_a_comparison_can_fail():
    """Another curve than the reference's is seen, in either precision."""
    eager, moved = [3.0, 2.0, 1.0], [3.0, 2.001, 1.001]
    for precision, accelerated, ok in (
        ("fp32", [3.0, 2.0, 1.0000001], True),
        ("fp32", [3.0, 2.0, 1.001], False),
        ("bf16", [3.0, 2.001, 1.0], True),
        ("bf16", [3.0, 2.0, 1.01], False),  # worse at one step
        ("bf16", [3.0016, 2.0016, 1.0016], False),  # worse in the mean
    ):
        curves = {"eager": eager, "accelerated": accelerated, "eager, moved 1": moved}
        runs = {name: {"loss": losses} for name, losses in curves.items()}
        assert compare.judge(precision, runs)["ok"] is ok, (precision, accelerated)


def test_moved_weights_are_one_ulp_away():
    from elmkernels import OpenELM, OpenELMConfig

    config = OpenELMConfig(num_transformer_layers=1, model_dim=32, head_dim=16, vocab_size=64)
    model = OpenELM.from_config(config, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    compare.moved_model(model, 1)
    for old, new in zip(before, model.parameters(), strict=True):
        up = torch.nextafter(old, torch.full_like(old, torch.inf))
        down = torch.nextafter(old, torch.full_like(old, -torch.inf))
        assert torch.all((new == up) | (new == down))
        assert (new == up).any() and (new == down).any()
