"""Inputs of projections are made again in the backward pass: the same bits, less memory."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.acceleration import recompute
from elmkernels.openelm import next_token_loss
from elmkernels.openelm.shared_weight import TiedWeightGradient

CONFIG = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=128,
    head_dim=32,
    num_gqa_groups=2,
    vocab_size=301,
    ffn_dim_divisor=32,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    normalize_qk_projections=True,
    share_input_output_layers=True,
)
IDS = torch.arange(2 * 21).view(2, 21) * 7 % 301
PROJECTIONS = ("attn.qkv_proj", "ffn.proj_1", "ffn.proj_2")
AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def accelerated() -> OpenELM:
    model = OpenELM(CONFIG, seed=0)
    accelerate(model)
    return model


def loss_of(model: OpenELM, autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return next_token_loss(model(IDS), IDS)


def gradients(model: OpenELM, autocast: bool) -> dict[str, torch.Tensor]:
    loss = loss_of(model, autocast)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@AUTOCAST
def test_gradients_are_the_same_bits(monkeypatch, autocast):
    made = []
    apply = recompute.apply

    def counted(module, x, make):
        return apply(module, x, None if make is None else lambda: made.append(1) or make())

    monkeypatch.setattr(recompute, "apply", counted)
    lean = gradients(accelerated(), autocast)
    assert len(made) == len(PROJECTIONS) * 2
    monkeypatch.setattr(recompute, "apply", lambda module, x, make: module(x))
    kept = gradients(accelerated(), autocast)
    for name, value in kept.items():
        assert torch.equal(lean[name], value), name


@AUTOCAST
def test_the_inputs_are_not_kept(autocast):
    model = accelerated()
    seen = {}
    for name in (*PROJECTIONS, "attn.out_proj"):

        def watch(module, args, name=name):
            seen[name] = StorageWeakRef(args[0].untyped_storage())

        model.layers[1].get_submodule(name).register_forward_pre_hook(watch)
    loss = loss_of(model, autocast)  # holds the graph
    assert {name for name, storage in seen.items() if not storage.expired()} == {"attn.out_proj"}
    assert loss.isfinite()


@AUTOCAST
def test_a_checkpointed_layer_keeps_nothing_of_it(autocast):
    """Its own hooks keep nothing; ours inside would hold what it means to let go."""
    plain, checkpointed = accelerated(), accelerated()
    checkpointed.gradient_checkpointing = True
    made = []
    for layer in checkpointed.layers:
        layer._again = lambda *_: made.append(1)
    a, b = gradients(plain, autocast), gradients(checkpointed, autocast)
    assert not made
    for name, value in a.items():
        assert torch.equal(b[name], value), name


def test_a_layer_with_a_module_left_as_it_was_still_trains():
    model = OpenELM(CONFIG, seed=0)
    model.layers[0].ffn.register_forward_hook(lambda *_: None)
    accelerate(model)
    expected, got = gradients(OpenELM(CONFIG, seed=0), False), gradients(model, False)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


def test_a_copy_of_the_model_makes_its_own_inputs_again():
    model = copy.deepcopy(accelerated())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    expected = accelerated()
    expected.load_state_dict(model.state_dict())
    got = gradients(model, False)
    for name, value in gradients(expected, False).items():
        assert torch.equal(got[name], value), name


def tied_loss(weight: torch.Tensor, tied: bool, padding: int | None = None) -> torch.Tensor:
    ids = torch.tensor([[3, 0, 3, 5], [1, 5, 2, 3]])
    if tied:
        shared = TiedWeightGradient(weight, padding)
        x, head = shared.embed(ids), shared.projection()
    else:
        x, head = torch.nn.functional.embedding(ids, weight, padding_idx=padding), weight
    return (x.tanh() @ head.t()).square().sum()


@pytest.mark.parametrize("padding", [None, 3])
def test_a_tied_weight_has_one_gradient_the_sum_of_both(padding):
    weight = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(tied_loss(weight, False, padding), weight)
    for _ in range(2):
        (got,) = torch.autograd.grad(tied_loss(weight, True, padding), weight)
        torch.testing.assert_close(got, expected)


def test_a_tied_weight_stands_a_second_backward():
    weight = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(tied_loss(weight, False), weight)
    loss = tied_loss(weight, True)
    for _ in range(3):
        (got,) = torch.autograd.grad(loss, weight, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_an_embedding_alone_has_a_gradient():
    weight = torch.randn(7, 12, requires_grad=True)
    (got,) = torch.autograd.grad(
        TiedWeightGradient(weight).embed(torch.tensor([2, 2, 5])).sum(), weight
    )
    assert torch.equal(got.sum(1), torch.tensor([0.0, 0, 24, 0, 0, 12, 0]))


@AUTOCAST
def test_the_loss_of_a_tied_model_makes_the_embedding_one_gradient(monkeypatch, autocast):
    made = []
    projection = TiedWeightGradient.projection
    monkeypatch.setattr(
        TiedWeightGradient, "projection", lambda shared: made.append(1) or projection(shared)
    )
    results = []
    for tied in (True, False):
        model = accelerated()
        if not tied:
            model.loss_head.shared_gradient = lambda embedding: None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model.loss(IDS, IDS.roll(-1, 1)).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert len(made) == 1
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-5, atol=1e-7)
