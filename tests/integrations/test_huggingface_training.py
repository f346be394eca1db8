"""Labels, gradients and the Trainer of transformers, on the fused loss."""

import pytest
import torch
from helpers.transformers_models import KINDS, eager, ids, left_padded, trained, wrapped
from torch.nn import functional as F

pytest.importorskip("transformers")

from elmkernels.acceleration import fused


def loss_and_gradients(model, **inputs):
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same_step(a, b, **inputs):
    (loss, grads), (expected, wanted) = (loss_and_gradients(m, **inputs) for m in (a, b))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == wanted.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_that_of_plain_pytorch(kind):
    values = KINDS[kind]
    labels = ids(2, 12)
    labels[0, :5] = -100
    assert_same_step(
        wrapped("auto", **values).train(), eager(**values).train(), input_ids=ids(2, 12),
        labels=labels,
    )  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_steps(side):
    tokens, mask = left_padded([5, 12])
    if side == "right":
        tokens, mask = tokens.flip(1), mask.flip(1)
    labels = tokens.masked_fill(mask == 0, -100)
    if side == "left":  # the first real token would be predicted from padding
        labels[0, 7] = -100
    assert_same_step(
        wrapped("auto").train(), eager().train(), input_ids=tokens, attention_mask=mask,
        labels=labels,
    )  # fmt: skip


def test_the_loss_is_fused_and_the_logits_come_when_asked(monkeypatch):
    calls = []
    real = fused.ops.linear_cross_entropy
    monkeypatch.setattr(
        fused.ops, "linear_cross_entropy", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    model = wrapped("auto").train()
    made = []
    model.transformer.logits_head.register_forward_hook(lambda *args: made.append(1))
    out = model(ids(2, 9), labels=ids(2, 9))
    out.loss.backward(retain_graph=True)
    assert calls == [1] and made == []
    expected = wrapped(None)(ids(2, 9)).logits
    for logits in (out.logits, out["logits"], out.to_tuple()[1], out[1]):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert made == [1]
    pair = model(ids(2, 9), labels=ids(2, 9), return_dict=False)
    assert len(pair) == 2 and pair[1].shape == (2, 9, 320)


@pytest.mark.parametrize("grad", [True, False])
def test_how_the_loss_is_counted(grad):
    model = wrapped("auto").train(grad)
    tokens, labels = ids(2, 9), ids(2, 9)
    labels[1, 4:] = -100
    with torch.set_grad_enabled(grad):
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        count = int((labels[:, 1:] != -100).sum())
        for options, expected in (
            ({}, summed / count),
            ({"num_items_in_batch": 40}, summed / 40),
            ({"num_items_in_batch": torch.tensor(40)}, summed / 40),
        ):
            got = model(tokens, labels=labels, **options).loss
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        got = model(tokens, shift_labels=shifted).loss
        torch.testing.assert_close(got, summed / count, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_without_its_head(tied):
    model = wrapped("auto", share_input_output_layers=tied)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids(2, 6), use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(hidden), model(ids(2, 6)).logits, rtol=1e-4, atol=1e-4)
    if tied:
        assert head is model.lm_head and head in model.modules()
        assert head.weight is model.get_input_embeddings().weight
    assert len(model.base_model.layers) == 3


KEPT = {
    "the last": (1, lambda x: x[:, -1:]),
    "positions": (torch.tensor([0, 4]), lambda x: x[:, [0, 4]]),
    "each row's": (torch.tensor([[0], [4]]), lambda x: torch.stack((x[0, :1], x[1, 4:5]))),
    "a mask": (torch.arange(10).view(2, 5) % 3 == 0, lambda x: x.flatten(0, 1)[::3]),
}


@pytest.mark.parametrize("kind", KEPT)
def test_which_positions_get_logits(kind):
    keep, expected = KEPT[kind]
    model = wrapped("auto")
    for labels in (None, ids(2, 5)):
        whole = model(ids(2, 5), labels=labels).logits
        got = model(ids(2, 5), labels=labels, logits_to_keep=keep).logits
        torch.testing.assert_close(got, expected(whole), rtol=1e-5, atol=1e-5)


def test_a_loss_of_ones_own():
    model = wrapped("auto")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean() + vocab_size
    out = model(ids(1, 5), labels=ids(1, 5))
    torch.testing.assert_close(out.loss, out.logits.mean() + 320)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_steps(reentrant, every):
    plain, again = wrapped("auto").train(), wrapped("auto").train()
    again.gradient_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
    assert again.is_gradient_checkpointing
    passes = []
    for layer in again.transformer.layers:
        layer.register_forward_pre_hook(lambda *args: passes.append(1))
    assert_same_step(again, plain, input_ids=ids(2, 12), labels=ids(2, 12))
    assert len(passes) == 3 + (3 if every == 1 else 2)
    again.gradient_checkpointing_disable()
    assert not again.is_gradient_checkpointing


def test_the_loss_stays_fused_with_checkpointing(monkeypatch):
    """transformers hooks the embedding then."""
    calls = []
    real = fused.ops.linear_cross_entropy
    monkeypatch.setattr(
        fused.ops, "linear_cross_entropy", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    model = wrapped("auto").train()
    model.gradient_checkpointing_enable()
    model(ids(1, 8), labels=ids(1, 8)).loss.backward()
    assert calls == [1]


def test_frozen_weights_and_embedded_inputs():
    model, other = wrapped("auto").train(), eager().train()
    for m in (model, other):
        m.transformer.token_embeddings.weight.requires_grad_(False)
        for layer in m.transformer.layers[:2]:
            layer.requires_grad_(False)
    assert_same_step(model, other, input_ids=ids(2, 7), labels=ids(2, 7))
    x = torch.randn(2, 7, 128, requires_grad=True)
    model(inputs_embeds=x, labels=ids(2, 7)).loss.backward()
    got, x.grad = x.grad, None
    other(inputs_embeds=x, labels=ids(2, 7)).loss.backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-3, atol=1e-6)


RUNS = {
    "float32": {},
    "bf16": {"bf16": True},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("run", RUNS)
def test_the_trainer_learns_what_plain_pytorch_learns(run, tmp_path):
    pytest.importorskip("accelerate")
    trainer, losses = trained(tmp_path / "ours", **RUNS[run])
    _, expected = trained(tmp_path / "theirs", wrapped(None), **RUNS[run])
    slack = 3e-2 if run == "bf16" else 1e-3
    assert losses == pytest.approx(expected, rel=slack)
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]


def test_save_and_resume(tmp_path):
    pytest.importorskip("accelerate")
    trainer, first = trained(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=4)
    from elmkernels import hf

    saved = tmp_path / "run/checkpoint-4"
    again = hf.OpenELMForCausalLM.from_pretrained(saved)
    for (name, a), b in zip(trainer.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    resumed, losses = trained(tmp_path / "run", wrapped("auto"), resume=str(saved), max_steps=8)
    assert resumed.state.global_step == 8 and losses[:4] == first
