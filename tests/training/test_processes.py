"""Two processes under torchrun on gloo: the curve of one process, whatever is done to them."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.runs import (
    ROOT,
    environment,
    launch,
    losses,
    steps_of,
    torchrun,
    train,
    weights,
    write_recipe,
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and os.name == "posix"),
    reason="needs torch.distributed with gloo",
)
DIES = str(ROOT / "tests/helpers/crashes/dies.py")
STEPS = 20
# Sums in another order; nothing else may differ.
ROUNDING = 1e-5
FSDP = ("--set", "engine.parallel=fsdp")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe and the OUT of one process."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder, STEPS)
    train(recipe, folder / "out")
    return recipe, folder / "out"


def assert_same_curve(out: Path, expected: Path) -> None:
    found, curve = losses(out), losses(expected)
    assert list(found) == list(curve) == list(range(1, STEPS + 1))
    for step in curve:
        assert found[step] == pytest.approx(curve[step], rel=ROUNDING), step


def assert_same_models(out: Path, expected: Path) -> None:
    for which in ("final", "average"):
        found, whole = weights(out, which), weights(expected, which)
        assert found.keys() == whole.keys()
        for name, weight in whole.items():
            assert found[name].dtype == weight.dtype == torch.float32
            # Adam divides by the gradient's own size: rounding counts in units of the rate.
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_curve_of_one_process(alone, tmp_path, parallel):
    recipe, expected = alone
    done = torchrun(launch(recipe, tmp_path, "--set", f"engine.parallel={parallel}"))
    assert_same_curve(tmp_path, expected)
    assert_same_models(tmp_path, expected)
    assert done.stdout.count(f"step {STEPS} of {STEPS}") == 1  # one process speaks
    assert done.stderr.count("step 7/20") == 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_another_number_of_processes_goes_on(alone, tmp_path, parallel):
    recipe, expected = alone
    how = ("--set", f"engine.parallel={parallel}")
    torchrun(launch(recipe, tmp_path, *how, "--steps", "7"))
    train(recipe, tmp_path, "--resume", "--steps", "13")
    torchrun(launch(recipe, tmp_path, *how, "--resume"))
    assert steps_of(tmp_path, "resume") == [7, 13]
    assert_same_curve(tmp_path, expected)
    assert_same_models(tmp_path, expected)


def test_recomputed_layers(alone, tmp_path):
    recipe, expected = alone
    how = ("--set", "engine.checkpoint_activations=true")
    torchrun(launch(recipe, tmp_path, *FSDP, *how))
    assert_same_curve(tmp_path, expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_stays_near(alone, tmp_path, parallel):
    recipe, expected = alone
    how = ("--set", f"engine.parallel={parallel}", "--set", "engine.precision=bf16")
    torchrun(launch(recipe, tmp_path, *how))
    found, curve = losses(tmp_path), losses(expected)
    assert all(found[step] == pytest.approx(curve[step], rel=0.02) for step in curve)
    assert found != curve


def test_one_process_is_killed_and_the_command_is_given_again(alone, tmp_path):
    recipe, expected = alone
    script = (DIES, str(tmp_path / "marker"))
    torchrun(launch(recipe, tmp_path / "out", script=script), code=1)
    assert max(losses(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "final").exists()
    torchrun(launch(recipe, tmp_path / "out"))
    assert steps_of(tmp_path / "out", "resume") == [4]
    assert_same_curve(tmp_path / "out", expected)
    assert_same_models(tmp_path / "out", expected)


def test_torchrun_starts_the_job_again(alone, tmp_path):
    recipe, expected = alone
    script = (DIES, str(tmp_path / "marker"))
    command = launch(recipe, tmp_path / "out", *FSDP, script=script)
    command[command.index("--max-restarts") + 1] = "1"
    torchrun(command)
    assert steps_of(tmp_path / "out", "resume") == [4]
    assert_same_curve(tmp_path / "out", expected)


def test_sigterm_to_torchrun_saves(tmp_path):
    recipe = write_recipe(tmp_path, 5000, keep={"checkpoint_every": 4000, "evaluate_every": 0})
    out, log = tmp_path / "out", tmp_path / "out" / "train.jsonl"
    with open(tmp_path / "stderr", "w") as errors:
        job = subprocess.Popen(
            launch(recipe, out), cwd=ROOT, env=environment(), stdout=errors, stderr=errors
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and job.poll() is None:
            if log.is_file() and '"event": "step"' in log.read_text():
                break
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=60)
    done = max(losses(out))
    assert steps_of(out, "saved") == steps_of(out, "stopped") == [done]
    assert (out / "checkpoints" / f"step-{done:08d}" / "trainer.json").is_file()
    assert f"stopped by SIGTERM after step {done}" in (tmp_path / "stderr").read_text()


def test_errors_are_one_line_of_one_process(alone, tmp_path):
    recipe, _ = alone
    for change, message in (
        (("data.train=/nowhere",), "data.train: /nowhere is no file"),
        (
            ("batch.sequences=3", "batch.micro=1"),
            "batch.sequences must be a multiple of the 2 processes, got 3",
        ),
    ):
        options = [word for field in change for word in ("--set", field)]
        done = torchrun(launch(recipe, tmp_path, *options), code=1)
        lines = [line for line in done.stderr.splitlines() if line.startswith("elmkernels: error")]
        assert len(lines) == 1 and message in lines[0]


def test_a_full_disk_of_several_processes(alone, tmp_path):
    recipe, _ = alone
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, -1)); "
    limited += "from elmkernels.cli.main import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "limited.py").write_text(limited)
    train(recipe, tmp_path / "out", "--steps", "1")  # so that the tokens are there
    script = (str(tmp_path / "limited.py"),)
    done = torchrun(launch(recipe, tmp_path / "out", script=script), code=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("elmkernels: error")]
    assert len(lines) == 1 and "step-00000004 can't be written" in lines[0]
    assert "that of step 1 stays the newest" in lines[0]
