"""The race of training steps: what it times is the same loss, and what it refuses."""

import math

import pytest
import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.bench import roofline, training_step
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


def test_a_race_measures_both_models_on_the_same_loss():
    sizes = training_step.Sizes(tokens=16, batch=2, rounds=3)
    race = training_step.StepRace(CONFIG, ("bf16", "fp32"), sizes, compiled=False)
    results, said, kept = training_step.start(race), [], []
    training_step.run(race, results, said.append, said.append, lambda: kept.append(1))
    assert results["complete"] and results["parity"]
    assert len(kept) >= 2 * len(race.precisions)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        found = results["precisions"][precision]
        losses = found["losses"]
        assert set(losses) == {roofline.EAGER, roofline.ACCELERATED}
        assert math.isclose(*losses.values(), rel_tol=tolerance)
        assert found["tokens"] == 32
        assert found["ratio"][roofline.EAGER] > 0
        for peaks in found["peak"].values():
            assert set(peaks) == {"first", "next"}
            assert all(bytes is not None and bytes >= 0 for bytes in peaks.values())


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
    ("arguments", "said"),
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
def test_wrong_options_are_named_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == "" and len(printed.err.splitlines()) == 1
