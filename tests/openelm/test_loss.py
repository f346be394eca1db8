"""OpenELM.loss and its head: eager, accelerated, tied or not, compressed, recomputed."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers.golden import load_tiny
from torch import nn

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize, restore
from elmkernels.acceleration.fused import FusedLossHead
from elmkernels.openelm import LossHead, next_token_loss, next_tokens
from elmkernels.testing import compare
from elmkernels.testing.rule import ATTENTION_SLACK

NAMES = ("tiny_layerwise", "tiny_mha_untied")  # tied, and with a classifier of its own
both = pytest.mark.parametrize("name", NAMES)


def loaded(name: str, dtype: torch.dtype = torch.float32, accelerated: bool = False):
    case = load_tiny(name)
    model = case.model(dtype)
    if accelerated:
        accelerate(model)
    return model, case.tensors["input_ids"]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@both
@pytest.mark.parametrize("accelerated", [False, True])
def test_it_is_the_mean_of_the_next_tokens(name, accelerated):
    model, ids = loaded(name, accelerated=accelerated)
    exact, _ = loaded(name, torch.float64)
    eager, _ = loaded(name)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for given in (None, mask):
        truth = next_token_loss(exact(ids, given), ids, given)
        expected = next_token_loss(eager(ids, given), ids, given)
        loss = model.loss(ids, next_tokens(ids, given), attention_mask=given)
        assert loss.dtype == torch.float32
        found = compare(truth, expected, loss, "loss", ATTENTION_SLACK)
        assert found.ok, found.reason


@both
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_swapped_model_has_the_loss_and_gradients_of_eager(name, reduction):
    """With every option; truth is the reference in float64."""
    results = {}
    for key, dtype, accelerated in (
        ("truth", torch.float64, False),
        ("eager", torch.float32, False),
        ("accelerated", torch.float32, True),
    ):
        model, ids = loaded(name, dtype, accelerated)
        options = {"z_loss": 1e-3, "label_smoothing": 0.1, "reduction": reduction}
        targets = next_tokens(ids, ignore_index=7).masked_fill(ids == 3, 7)
        loss = model.loss(ids, targets, ignore_index=7, **options)
        results[key] = {"loss": loss.detach()} | gradients(model, loss.sum())
    for what, truth in results["truth"].items():
        eager, got = results["eager"][what], results["accelerated"][what]
        found = compare(truth.double(), eager, got, what, ATTENTION_SLACK)
        assert found.ok, f"{what}: {found.reason}"


@both
def test_accelerate_swaps_the_head_and_restore_brings_it_back(name):
    model, ids = loaded(name)
    keys, original = list(model.state_dict()), model.loss_head
    report = accelerate(model)
    assert isinstance(model.loss_head, FusedLossHead)
    assert report.accelerated["loss heads"] == 1
    assert report.loss in str(report)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.loss(ids, ids), model.loss(ids, ids))
    restore(model)
    assert model.loss_head is original
    assert type(original) is LossHead


@both
def test_no_logits_lie_in_memory(name, monkeypatch):
    model, ids = loaded(name, accelerated=True)
    monkeypatch.setattr(type(model), "project", None)  # calling it would fail
    monkeypatch.setattr("elmkernels.openelm.model._PROJECT", None)  # nor was it replaced
    model.loss(ids, next_tokens(ids)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_adapter_in_the_classifiers_place_is_asked():
    """And a hook: what isn't a plain product is never skipped."""

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1 - x.sum(-1, keepdim=True)[..., :1].tanh()

    model, ids = loaded("tiny_mha_untied", accelerated=True)
    plain = model.loss(ids, ids)
    handle = model.classifier.register_forward_hook(lambda m, args, out: 2 * out)
    assert not torch.equal(model.loss(ids, ids), plain)
    torch.testing.assert_close(model.loss(ids, ids), logits_loss(model, ids))
    handle.remove()
    assert torch.equal(model.loss(ids, ids), plain)
    adapter = Adapter(*model.classifier.weight.shape[::-1], bias=False)
    model.classifier = adapter
    torch.testing.assert_close(model.loss(ids, ids), logits_loss(model, ids))


def logits_loss(model, ids):
    logits = model(ids).float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, ids.flatten())


SMALL = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=128,
    head_dim=64,
    num_gqa_groups=2,
    vocab_size=300,
    ffn_dim_divisor=64,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
)


@pytest.mark.parametrize(
    "compress", [lambda m: quantize(m, bits=8), pack], ids=["int8", "packed12"]
)
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_compressed_head_is_projected_by_its_own_product(compress, accelerated, tied):
    config = replace(SMALL, share_input_output_layers=tied)
    model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16)
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    compress(model)
    if accelerated:
        accelerate(model)
    loss = model.loss(ids, ids)
    torch.testing.assert_close(loss, logits_loss(model, ids))
    loss.backward()
    assert model.norm.weight.grad.isfinite().all()


@both
def test_autocast(name):
    losses = []
    for accelerated in (False, True):
        model, ids = loaded(name, accelerated=accelerated)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, next_tokens(ids))
        assert loss.dtype == torch.float32
        found = gradients(model, loss)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


@both
def test_a_compiled_step_equals_eager(name):
    model, ids = loaded(name, accelerated=True)
    expected = gradients(model, model.loss(ids, next_tokens(ids)))
    torch.compiler.reset()
    traced = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    got = gradients(model, traced(ids, next_tokens(ids)))
    for what in expected:
        torch.testing.assert_close(got[what], expected[what])


@both
@pytest.mark.parametrize("accelerated", [False, True])
def test_documents_have_losses_of_their_own(name, accelerated):
    model, ids = loaded(name, accelerated=accelerated)
    batch, length = ids.shape
    bounds = sorted({*range(0, batch * length + 1, length), length // 2})
    losses = model.loss(ids, ids, cu_seqlens=torch.tensor(bounds), reduction="none").flatten()
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        one = ids.flatten()[None, a:b]
        torch.testing.assert_close(losses[a:b], model.loss(one, one, reduction="none")[0])


@both
@pytest.mark.parametrize("accelerated", [False, True])
def test_any_layers_may_be_recomputed(name, accelerated):
    model, ids = loaded(name, accelerated=accelerated)
    expected = gradients(model, model.loss(ids, ids))
    count = len(model.layers)
    calls = []
    for i, layer in enumerate(model.layers):
        layer.attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    for chosen in (False, (), [0], {count - 1}, range(count), True):
        calls.clear()
        model.gradient_checkpointing = chosen
        got = gradients(model, model.loss(ids, ids))
        assert all(torch.equal(got[what], expected[what]) for what in expected)
        again = range(count) if chosen is True else chosen or ()
        assert sorted(calls) == sorted([*range(count), *again])
    model.gradient_checkpointing = [count]
    message = rf"gradient_checkpointing must be a bool or layers in \[0, {count}\), got \[{count}\]"
    with pytest.raises(ValueError, match=message):
        model.loss(ids, ids)


@both
def test_hidden_states_are_what_is_projected(name):
    model, ids = loaded(name)
    assert torch.equal(model.project(model.hidden_states(ids)), model(ids))
    assert torch.equal(
        model.project(model.hidden_states(ids, logits_to_keep=1)), model(ids, logits_to_keep=1)
    )


def test_targets_of_another_shape_or_out_of_range_are_refused():
    model, ids = loaded("tiny_layerwise", accelerated=True)
    with pytest.raises(ValueError, match="targets must be .* like input_ids"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(ValueError, match="targets must be in"):
        model.loss(ids, ids + 10**6)


def test_next_tokens_are_ignored_where_one_of_two_is_padding():
    ids = torch.tensor([[5, 6, 7, 8]], dtype=torch.int32)
    assert next_tokens(ids).tolist() == [[6, 7, 8, -100]]
    mask = torch.tensor([[0, 1, 1, 0]])
    assert next_tokens(ids, mask, -1).tolist() == [[-1, 7, -1, -1]]
