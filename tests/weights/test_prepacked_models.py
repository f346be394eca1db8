"""Weights held prepacked alone: whoever asks for one gets its bits, and no memory is taken."""

import copy
import gc
import io
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import CONFIG, GROUPED, IDS, held, linears, logits, made, same

import elmkernels
from elmkernels import OpenELM, Plan, accelerate, restore
from elmkernels.acceleration import projections, swap
from elmkernels.acceleration.routines import ALONE, LINEAR, PREPACKED, alone_plan
from elmkernels.generation.step import greedy, new_cache, next_logits
from elmkernels.surgery import is_accelerated
from elmkernels.weights import prepacked
from elmkernels.weights.prepacked import (
    parameters_of,
    prepacked_copy,
)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """No timing of routines."""
    monkeypatch.setattr(swap, "measure_plan", lambda dtype, prepack: Plan())


def test_what_cannot_be_turned_back_stays(monkeypatch):
    monkeypatch.setattr(prepacked, "_exact", lambda *shape: False)
    model = made()
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    report = accelerate(model, prepack=ALONE)
    assert held(model) == 0 and "0 of 12 projections hold" in str(report)
    torch.testing.assert_close(logits(model), expected)
    assert same(model.state_dict(), before)


# Who asks for all weights, each gives them by their names.
def _saved(model):
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    return torch.load(stream)


def _functional(model):
    seen = {}

    def look(module, args):
        seen.update({k: v for k, v in model.state_dict().items()})

    given = {k: v.detach() for k, v in model.named_parameters()}
    hook = model.register_forward_pre_hook(look)
    torch.func.functional_call(model, given, (IDS,))
    hook.remove()
    return seen


ASKERS = {
    "state_dict": lambda m: m.state_dict(),
    "parameters": lambda m: dict(m.named_parameters()),
    "get_parameter": lambda m: {k: m.get_parameter(k) for k in m.state_dict()},
    "train": lambda m: m.train().state_dict(),
    "torch.save": _saved,
    "deepcopy": lambda m: copy.deepcopy(m).state_dict(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).state_dict(),
    "restore": lambda m: (restore(m), m.state_dict())[1],
    "accelerate": lambda m: (accelerate(m, prepack=False), m.state_dict())[1],
    "to": lambda m: m.to(torch.float64).to(torch.float32).state_dict(),
    "functional_call": _functional,
    "requires_grad_": lambda m: dict(m.requires_grad_(False).named_parameters()),
    "apply": lambda m: (seen := {}, m.apply(lambda x: seen.update(
        {id(x): x._parameters})), m.state_dict())[2],
}  # fmt: skip


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("asker", ASKERS)
def test_whoever_asks_gets_the_bits(asker, untied):
    """And the model computes the same afterwards, whatever it holds then."""
    model = made(untied)
    before = copy.deepcopy(model.state_dict())
    eager = logits(model)
    accelerate(model, prepack=ALONE)
    count = 12 + untied
    assert len(linears(model)) == held(model) == count
    expected = logits(model)
    torch.testing.assert_close(expected, eager)
    assert held(model) == count
    found = ASKERS[asker](model)
    assert same(dict(found), before)
    del found
    gc.collect()
    model.eval()
    if asker in ("restore", "accelerate"):
        assert held(model) == 0
        assert all(type(parameters_of(m)) is dict for m in model.modules())
        torch.testing.assert_close(logits(model), eager)
    else:
        assert torch.equal(logits(model), expected) and held(model) == count


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_holds_its_own(again):
    model = made()
    accelerate(model, prepack=ALONE)
    expected = logits(model)
    other = again(model)
    assert torch.equal(logits(other), expected) and held(other) == 12
    with torch.no_grad():
        other.layers[0].ffn.proj_1.weight.mul_(2)
    assert not torch.equal(logits(other), expected) and torch.equal(logits(model), expected)


def test_gradients_are_those_of_dense_weights():
    model, truth = made(), made()
    accelerate(model, prepack=ALONE)
    logits(model)
    accelerate(truth, plan=Plan())
    for each in (model, truth):
        each.loss(IDS, IDS).backward()
    assert held(model) == 0
    for a, b in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_generation_leaves_them_held(dtype, grad):
    """The steps go by the layers, as the whole decoder in one call reads dense weights."""
    model, truth = made(dtype=dtype), made(dtype=dtype)
    accelerate(truth, prepack=True, plan=alone_plan(Plan()))
    accelerate(model, prepack=ALONE)
    model.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        cache = new_cache(model, 2, 20)
        first = model(IDS, cache=cache, logits_to_keep=1)[:, -1]
        then = next_logits(model, first.argmax(-1), cache)
    assert then.shape == (2, CONFIG.vocab_size) and held(model) == 12
    assert greedy(model, IDS, 5).tolist() == greedy(truth, IDS, 5).tolist()
    assert held(model) == 12
    with pytest.raises(ValueError, match=r"layers.0.attn.qkv_proj holds its weight prepacked"):
        elmkernels.openelm.decoder_weights_of(model)
    assert held(model) == 12


@pytest.mark.parametrize("what", ["autocast", "compiled", "inference mode", "hooks", "vmap"])
def test_other_ways_to_call(what):
    model, truth = made(), made()
    accelerate(model, prepack=ALONE)
    if what == "compiled":
        with torch.no_grad():
            found = torch.compile(model, backend="eager")(IDS)
        torch.testing.assert_close(found, logits(truth))
    elif what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(logits(model), logits(truth), rtol=0.1, atol=0.1)
    elif what == "inference mode":
        with torch.inference_mode():
            expected = model(IDS)
            model.layers[0].attn.qkv_proj.weight  # noqa: B018
        model.loss(IDS, IDS).backward()  # made again there, it can still be trained
        assert model.layers[0].attn.qkv_proj.weight.grad is not None
        torch.testing.assert_close(expected, logits(truth))
        return
    elif what == "hooks":
        seen = []
        model.layers[0].ffn.proj_1.register_forward_hook(lambda m, a, y: seen.append(y))
        torch.testing.assert_close(logits(model), logits(truth))
        assert len(seen) == 1 and held(model) == 12
    else:
        layer = model.layers[0].ffn.proj_1
        x = torch.randn(3, 2, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(layer)(x), x @ layer.weight.T)
    gc.collect()
    assert torch.equal(logits(model), logits(model)) and held(model) == 12


def test_what_is_interrupted_leaves_dense_weights(monkeypatch):
    """By a key, in the middle of the copies, of a model that was accelerated otherwise."""
    model = made()
    before = copy.deepcopy(model.state_dict())
    accelerate(model, prepack=False)
    calls = []

    def interrupted(weight):
        calls.append(weight.shape)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return prepacked_copy(weight)

    monkeypatch.setattr(prepacked, "prepacked_copy", interrupted)
    monkeypatch.setattr(prepacked, "_exact", lambda *shape: True)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, prepack=ALONE)
    assert is_accelerated(model) and held(model) == 0
    assert all(type(parameters_of(m)) is dict for m in model.modules())
    assert same(model.state_dict(), before)


def test_two_threads_call_and_ask():
    model = made()
    before = copy.deepcopy(model.state_dict())
    accelerate(model, prepack=ALONE)
    expected, wrong = logits(model), []

    def call():
        for _ in range(30):
            if not torch.equal(logits(model), expected):
                wrong.append("logits")

    def ask():
        for _ in range(30):
            if not same(model.state_dict(), before):
                wrong.append("weights")

    threads = [threading.Thread(target=f) for f in (call, ask, call, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TestRefused:
    """Before anything is changed, with what it needs."""

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"prepack": "always"}, ValueError, "prepack must be True, False, 'only' or None"),
            ({"prepack": 1}, TypeError, "prepack must be True, False, 'only' or None, got 1"),
            (
                {"prepack": ALONE, "plan": Plan(PREPACKED, LINEAR, PREPACKED)},
                ValueError,
                "plan must be None or 'oneDNN prepacked' for any number of rows",
            ),
        ],
    )
    def test_arguments(self, options, error, message):
        model = made()
        with pytest.raises(error, match=message):
            accelerate(model, **options)
        assert not is_accelerated(model) and held(model) == 0

    def test_a_dtype_that_onednn_does_not_multiply(self, monkeypatch):
        monkeypatch.setattr("elmkernels.acceleration.routines.onednn_takes", lambda dtype: False)
        model = made()
        with pytest.raises(RuntimeError, match="'only' needs oneDNN to multiply torch.float32"):
            accelerate(model, prepack=ALONE)
        assert not is_accelerated(model)

    def test_no_dense_weight(self):
        model = OpenELM(GROUPED, seed=1)
        elmkernels.quantize(model, 8, 32, progress=False)
        with pytest.raises(ValueError, match="no projection has a dense weight"):
            accelerate(model, prepack=ALONE)
        assert not is_accelerated(model)


@pytest.mark.parametrize("given", [None, alone_plan(Plan())])
def test_a_conversion_leaves_nothing_to_hold(given):
    model = OpenELM(GROUPED, seed=1).eval()
    truth = copy.deepcopy(model)
    accelerate(model, prepack=ALONE, plan=given)
    for each in (model, truth):
        elmkernels.quantize(each, 8, 32, progress=False)
    assert is_accelerated(model) and held(model) == 0
    torch.testing.assert_close(logits(model), logits(truth))


@pytest.mark.parametrize("given", [None, alone_plan(Plan())])
def test_a_checkpoint_of_weights_that_are_held(given, tmp_path):
    model = made(True, torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    accelerate(model, prepack=ALONE, plan=given)
    assert held(model) == 13
    model.save_pretrained(tmp_path)
    again = OpenELM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(again.state_dict(), before)
    logits(model)
    assert held(model) == 13


def test_the_plan_of_a_report_can_be_given_again():
    model = made()
    plan = accelerate(model, prepack=ALONE).gemm
    assert plan == replace(alone_plan(Plan()), training=plan.training)
    accelerate(model, prepack=ALONE, plan=plan)
    assert held(model) == 12
    assert not projections._COPIES or all(
        w is not model.token_embeddings.weight for w in projections._COPIES
    )
