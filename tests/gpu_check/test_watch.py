"""A unit that hangs, or ends its process: it alone has failed, and all else is done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elmkernels.cli import gpu_check
from elmkernels.cli.main import main
from elmkernels.gpu_check import watch
from elmkernels.gpu_check.stages import Clock
from elmkernels.gpu_check.watch import Stuck, Worker, run_watched

ROOT = Path(__file__).resolve().parents[2]

# The command with two units, whose first one does something else and has seconds alone to do it in.
PROGRAM = """
import os, sys, time
from dataclasses import replace
import torch
from elmkernels.cli.main import main
from elmkernels.gpu_check import check as gpu_check
from elmkernels.gpu_check import generation_units as gpu_generation
torch.set_num_threads(1)
units, check = gpu_check.generation_units, gpu_generation.check_model
def limited(models):
    two = [u for u in units(models) if u.name in ("tiny float32", "tiny bfloat16")]
    return [replace(two[0], limit={limit}), replace(two[1], limit=600)]
def does(eager, *args):
    if eager.norm.weight.dtype == torch.float32:
        print("begun", file=sys.stderr, flush=True)
        {does}
    return check(eager, *args)
gpu_check.generation_units, gpu_generation.check_model = limited, does
sys.exit(main(sys.argv[1:]))
"""


def program(does: str, limit: float) -> tuple[str, ...]:
    return sys.executable, "-c", PROGRAM.format(does=does, limit=limit)


def units_of(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    return found["stages"]["generation"]["units"] | {"complete": found["complete"]}


QUICK = ["--device", "cpu", "--quick", "--watch", "--stages", "generation", "--minutes", "20"]


@pytest.mark.parametrize(
    ("does", "limit", "error"),
    [
        ("time.sleep(600)", 15, "hung: no answer for "),
        ("os._exit(7)", 600, "its process ended with 7"),
    ],
    ids=["hangs", "ends"],
)
def test_the_rest_goes_on(tmp_path, monkeypatch, capfd, does, limit, error):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_check, "PROGRAM", program(does, limit))
    out = tmp_path / "out"
    begin = time.monotonic()
    assert main(["gpu-check", *QUICK, "--out", str(out)]) == 1
    assert time.monotonic() - begin < 300
    found = units_of(out)
    assert found["complete"] is True
    assert found["tiny float32"]["state"] == "failed"
    assert found["tiny float32"]["error"].startswith(error)
    assert found["tiny bfloat16"]["state"] == "done" and "limit" not in found["tiny bfloat16"]
    text = capfd.readouterr()
    assert text.err.count("begun") == 1, "what failed is not done again"
    assert "another process goes on" in text.err
    assert re.search(rf"wrote results.json, summary.md.* to {out}\n", text.err)
    assert f"generation, tiny float32: {error}" in (out / "summary.md").read_text()


def test_ctrl_c_ends_a_worker_and_keeps_what_there_is(tmp_path):
    out = tmp_path / "out"
    worker = program("time.sleep(600)", 600)
    code = f"""
import sys
from elmkernels.cli.main import main
from elmkernels.cli import gpu_check
gpu_check.PROGRAM = {worker!r}
sys.exit(main(sys.argv[1:]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, "gpu-check", *QUICK, "--out", str(out)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if line == "begun\n":
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    found = units_of(out)
    assert found["complete"] is False and found["tiny float32"]["state"] == "interrupted"
    summary = (out / "summary.md").read_text()
    assert "Stopped early" in summary and summary in stdout
    assert f"wrote results.json, summary.md to {out}" in stderr


def sleeper(results: dict, seconds: float) -> Worker:
    command = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
    return Worker(lambda left: command, lambda: results, results.update)


def test_a_worker_that_gets_nowhere_is_given_up(monkeypatch):
    results: dict = {"complete": False, "stages": {}}
    with pytest.raises(Stuck, match="before its first unit: its process ended with 0"):
        run_watched(sleeper(results, 0), Clock(60))
    monkeypatch.setattr(watch, "BETWEEN", 0.5)
    with pytest.raises(Stuck, match="before its first unit: hung"):
        run_watched(sleeper(results, 600), Clock(60))


def test_a_unit_may_not_outlast_all_the_time_by_much(monkeypatch):
    unit = {"state": "running", "limit": 600.0}
    results = {"stages": {"s": {"seconds": 1.0, "units": {"a": unit}, "left_out": {}}}}
    monkeypatch.setattr(watch, "OVERTIME", 0.5)
    with pytest.raises(Stuck):  # after the first hung one, the next worker has nothing to do
        run_watched(sleeper(results, 600), Clock(0))
    assert unit["state"] == "failed" and unit["error"].startswith("hung")
    assert results["stages"]["s"]["seconds"] > 1.0


def test_a_worker_whose_parent_is_gone_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.GpuCheck, "run", lambda check, results, report: report.save())
    (tmp_path / "results.json").write_text(json.dumps({"stages": {}}))
    argv = ["gpu-check", "--device", "cpu", "--quick", "--worker", "9", "--out", str(tmp_path)]
    assert main(argv) == 0
    parents = iter([1, 2])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    assert main(argv) == 130
