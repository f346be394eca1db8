"""Training that is killed at any moment, before the first checkpoint too, ends in the same bits."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.runs import environment, write_recipe

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and kills as POSIX has them")


def killed(folder, kills: int, seed: int, kernels: bool) -> dict:
    keep = {"checkpoint_every": 3, "checkpoints": 2, "evaluate_every": 0}
    engine = {"precision": "fp32", "kernels": kernels}
    recipe = write_recipe(folder, 10, keep=keep, engine=engine)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "helpers.crashes.kills",
            str(recipe),
            str(folder),
            str(kills),
            str(seed),
        ],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


def test_a_few_kills(tmp_path):
    found = killed(tmp_path, 4, 0, kernels=True)
    assert found["unequal"] == [] and found["kills"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False], ids=["accelerated", "eager"])
def test_a_hundred_kills(tmp_path, kernels):
    """Together 200, at every stage of a run."""
    found = killed(tmp_path, 100, 1, kernels)
    print(found)
    assert found["unequal"] == [] and found["kills"] == 100
    assert {"before the first step", "before the first checkpoint", "between checkpoints"} <= set(
        found["hit"]
    )
