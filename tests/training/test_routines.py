"""Two runs of one recipe end in the same bits, whatever a measurement would find."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import ROOT
from helpers.runs import losses, same_weights, train, write_recipe

from elmkernels import Plan
from elmkernels.acceleration import routines as products
from elmkernels.acceleration.routines import ONEDNN, onednn_takes
from elmkernels.cli.main import main
from elmkernels.training import routines
from elmkernels.training.journal import events
from elmkernels.training.recipe import from_mapping

FAST = {"few_rows": ONEDNN, "many_rows": ONEDNN, "training": ONEDNN}
needs_onednn = pytest.mark.skipif(
    not onednn_takes(torch.float32), reason="oneDNN doesn't multiply float32 here"
)


@pytest.fixture
def fickle(monkeypatch):
    """A measurement that finds another plan each time."""
    plans = itertools.cycle([Plan(**FAST), Plan()])
    found = []

    def measure(dtype, prepacked=False):
        found.append(next(plans))
        return found[-1]

    monkeypatch.setattr(products, "measure_plan", measure)
    monkeypatch.setattr(routines, "measure_plan", measure)
    return found


def plan_of(out):
    return next(e["plan"] for e in events(out / "train.jsonl") if e["event"] == "start")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_end_in_the_same_bits(tmp_path, fickle, precision, threads):
    recipe = write_recipe(tmp_path, engine={"precision": precision})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (train(recipe, tmp_path / name) for name in ("first", "second"))
    finally:
        torch.set_num_threads(before)
    assert first == second and same_weights(tmp_path / "first", tmp_path / "second")
    assert plan_of(tmp_path / "first") == plan_of(tmp_path / "second") and not fickle


@needs_onednn
def test_what_was_measured_is_recorded_and_repeats_the_run(tmp_path, fickle):
    recipe = write_recipe(tmp_path)
    measured = train(recipe, tmp_path / "measured", "--set", "engine.plan=measured")
    plan = plan_of(tmp_path / "measured")
    assert len(fickle) == 1 and plan == {**asdict(Plan()), **FAST}
    named = train(recipe, tmp_path / "named", "--set", f"engine.plan={json.dumps(plan)}")
    assert named == measured and same_weights(tmp_path / "named", tmp_path / "measured")
    assert len(fickle) == 1


@needs_onednn
@pytest.mark.parametrize("checkpoint_every", [4, 0], ids=["from a checkpoint", "from the log"])
def test_a_run_keeps_its_routines(tmp_path, fickle, checkpoint_every):
    recipe = write_recipe(
        tmp_path, engine={"plan": "measured"}, keep={"checkpoint_every": checkpoint_every}
    )
    whole = train(recipe, tmp_path / "whole")
    assert fickle == [Plan(**FAST)]
    script = (
        "import os, signal, sys\n"
        "from elmkernels import Plan\n"
        "from elmkernels.cli.main import main\n"
        "from elmkernels.training import loop, routines\n"
        f"routines.measure_plan = lambda dtype: Plan(**{FAST!r})\n"
        "step = loop.Trainer.step\n"
        "def dying(self):\n"
        "    if self.done == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "loop.Trainer.step = dying\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "train", str(recipe), "--out", str(tmp_path / "part")]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(losses(tmp_path / "part")) == 5
    fickle.clear()
    resumed = train(recipe, tmp_path / "part")
    assert not fickle, "nothing is measured again"
    assert same_weights(tmp_path / "whole", tmp_path / "part") and resumed == whole


def test_a_log_of_another_run_says_nothing_to_a_recipe_without_a_plan(tmp_path, fickle):
    recipe = write_recipe(tmp_path, keep={"checkpoint_every": 0})
    train(recipe, tmp_path / "out", "--set", "engine.plan=measured")
    train(recipe, tmp_path / "out")
    begun = [e["plan"] for e in events(tmp_path / "out" / "train.jsonl") if e["event"] == "start"]
    assert [Plan(**plan) for plan in begun] == [Plan(**FAST), Plan()]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("fast", "engine.plan must be null, measured or a mapping of routines, got 'fast'"),
        ({"rows": "oneDNN"}, "section engine.plan has no field rows"),
        ({"training": "torch.mv"}, "engine.plan.training must be F.linear or oneDNN, got 'torch"),
        ({"many_rows": "torch.mv"}, "engine.plan.many_rows must be F.linear or oneDNN or oneDNN p"),
        ({"one_row": ["oneDNN"]}, "engine.plan.one_row must be F.linear or torch.mv or oneDNN"),
        ({"streamed": 1}, "engine.plan.streamed must be true or false, got 1"),
        (3, "engine.plan must be a string or a mapping or null"),
    ],
)
def test_plans_that_are_none(plan, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_mapping({"engine": {"plan": plan}})


def test_a_library_that_is_wrong_here_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(routines, "onednn_takes", lambda dtype: False)
    recipe = write_recipe(tmp_path, engine={"plan": FAST})
    assert main(["train", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "engine.plan must be routines that give F.linear's products" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"event": "start", "plan": {"one_row": 3}}\n'])
def test_a_log_that_says_no_plan(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text)
    assert routines.noted(tmp_path) is None
