"""The Trainer with what takes longer: torch.compile, FSDP2 in two processes, Liger, resuming."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.transformers_models import Rows, trained, wrapped

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.ecosystem
TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_compiled_step(bf16, tmp_path):
    options = {"torch_compile": True, "bf16": bf16, "max_steps": 3}
    _, losses = trained(tmp_path / "ours", **options)
    _, expected = trained(tmp_path / "theirs", wrapped(None), **options | {"torch_compile": False})
    assert losses == pytest.approx(expected, rel=3e-2 if bf16 else 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointed_steps_accumulate(reentrant, bf16, tmp_path):
    options = {
        "gradient_checkpointing": True, "bf16": bf16, "max_steps": 3,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    _, losses = trained(tmp_path / "ours", **options)
    _, expected = trained(tmp_path / "theirs", wrapped(None), **options)
    assert losses == pytest.approx(expected, rel=3e-2 if bf16 else 1e-3)


class Uneven(Rows):
    """Rows of which different shares count."""

    def __getitem__(self, i: int) -> dict:
        row = super().__getitem__(i)
        row["labels"][: 1 + 5 * (i % 3)] = -100
        return row


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    """num_items_in_batch: each token counts the same, in whichever part of the batch it is."""
    import helpers.transformers_models as shared

    monkeypatch.setattr(shared, "Rows", Uneven)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole, _ = trained(tmp_path / "whole", max_steps=3)
    split, _ = trained(tmp_path / "split", max_steps=3, **parts)
    for (name, a), b in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("run", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_a_resumed_run_is_the_same_run(run, tmp_path):
    """Bit for bit."""
    straight, _ = trained(tmp_path / "straight", max_steps=6, **run)
    saving = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path / "parts", max_steps=6, **run | saving)
    saved = tmp_path / "parts/checkpoint-3"
    resumed, _ = trained(
        tmp_path / "again", wrapped("auto", seed=9), resume=str(saved), max_steps=6, **run
    )
    for (name, a), b in zip(
        straight.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["no", "yes"])
@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_two_processes_of_fsdp2(kernels, checkpointing):
    places = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        str(TESTS / "integrations/fsdp_trainer.py"), kernels, checkpointing,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal to one process: 26 parameters" in done.stdout


def test_liger_is_told_of_the_kernels(tmp_path):
    """`use_liger_kernel=True` accelerates a model that isn't, by its own settings."""
    pytest.importorskip("liger_kernel.transformers.monkey_patch")
    model = wrapped(None)
    assert model.report is None
    trainer, losses = trained(tmp_path / "liger", model, use_liger_kernel=True, max_steps=3)
    assert trainer.model.report.accelerated["layers"] == 3
    _, expected = trained(tmp_path / "plain", wrapped(None), max_steps=3)
    assert losses == pytest.approx(expected, rel=1e-3)
    reference = wrapped("reference")
    trained(tmp_path / "named", reference, use_liger_kernel=True, max_steps=1)
    assert set(reference.report.backends.values()) == {"reference"}
