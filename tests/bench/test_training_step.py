"""Training steps side by side: what is timed is the same loss, and what is refused."""

import math

import pytest
import torch
from helpers.reports import Recorded

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.bench import training_step
from elmkernels.bench.benchmark import ACCELERATED, EAGER
from elmkernels.bench.training_step import StepSizes, TrainingStep
from elmkernels.cli.main import main

CONFIG = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=64,
    head_dim=32,
    num_gqa_groups=2,
    vocab_size=101,
    ffn_dim_divisor=32,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    normalize_qk_projections=True,
    share_input_output_layers=True,
)


def benchmark(**options) -> TrainingStep:
    sizes = StepSizes(tokens=16, batch=2, rounds=3)
    return TrainingStep(config=CONFIG, sizes=sizes, compiled=False, **options)


def test_both_models_are_measured_on_the_same_loss():
    todo = benchmark()
    results = todo.start()
    report = Recorded(results)
    todo.run(results, report)
    assert results["complete"] and results["parity"] and todo.passed(results)
    assert len(report.stages) == todo.stages
    assert len(report.saved) >= 2 * len(todo.precisions)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        found = results["precisions"][precision]
        losses = found["losses"]
        assert set(losses) == {EAGER, ACCELERATED}
        assert math.isclose(*losses.values(), rel_tol=tolerance)
        assert found["tokens"] == 32
        assert found["ratio"][EAGER] > 0
        for peaks in found["peak"].values():
            assert set(peaks) == {"first", "next"}
            assert all(bytes is not None and bytes >= 0 for bytes in peaks.values())


def test_an_interruption_keeps_the_precisions_that_were_measured():
    todo = benchmark(memory=False)
    results = todo.start()
    with pytest.raises(KeyboardInterrupt):
        todo.run(results, Recorded(stop="fp32: time"))
    assert results["complete"] is False and list(results["precisions"]) == ["bf16"]


def test_a_parity_that_failed_is_no_pass():
    assert not benchmark().passed({"parity": False})
    assert benchmark().passed({"parity": None}), "stopped before it was measured"


def test_a_step_leaves_no_gradient_and_has_the_z_loss():
    model = OpenELM(CONFIG, seed=0)
    accelerate(model)
    ids = torch.arange(34).view(2, 17)
    loss = training_step._step(model, ids, "fp32")()
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = OpenELM(CONFIG, seed=0)(ids[:, :-1])
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, ids[:, 1:, None])[..., 0]
    expected = (nll + training_step.Z_LOSS * lse.square()).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "train", "--tokens", "0"], "must be a positive integer, got '0'"),
        (["bench", "train", "--formats", "int8"], "unrecognized arguments: --formats int8"),
        (["bench", "ops", "rms_norm", "--tokens", "4"], "unrecognized arguments: --tokens 4"),
        (["bench", "generate", "--tokens", "4"], "unrecognized arguments: --tokens 4"),
        (["bench", "train", "--dtype", "fp16"], "must be one of bf16, fp32, got 'fp16'"),
        (["bench", "train", "--checkpoint", "x"], "unrecognized arguments: --checkpoint x"),
        (["bench", "train", "--model", "7B"], "--model: must be one of"),
        (["bench", "train", "--backend", "sdpa"], "sdpa"),
        (["bench", "train", "--quick", "--no-compile"], "--no-compile has no effect"),
    ],
)
def test_wrong_options_are_named_in_one_line(arguments, named, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert named in printed.err
    assert printed.out == "" and len(printed.err.splitlines()) == 1
