"""Of a weight that is held prepacked alone no change is missed, and no memory is taken."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.checkpoints import IDS, held, linears, logits, made
from torch import nn

from elmkernels import Plan, accelerate
from elmkernels.acceleration import swap
from elmkernels.acceleration.routines import ALONE


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """No timing of routines."""
    monkeypatch.setattr(swap, "measure_plan", lambda dtype, prepack: Plan())


# What changes the weights; each must be seen by the next product.
def _written(model):
    with torch.no_grad():
        for layer in linears(model):
            layer.weight.mul_(1.5)


def _by_data(model):
    for layer in linears(model):
        layer.weight.data.mul_(1.5)


def _loaded(model, assign=False):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=assign)


def _replaced(model):
    for layer in linears(model):
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def _stepped(model):
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model.loss(IDS, IDS).backward()
    step.step()
    step.zero_grad()


CHANGES = {
    "written": _written,
    "by data": _by_data,
    "loaded": _loaded,
    "assigned": lambda m: _loaded(m, True),
    "replaced": _replaced,
    "stepped": _stepped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_never_missed(change):
    model = made()
    accelerate(model, prepack=ALONE)
    before = logits(model)
    CHANGES[change](model)
    truth = made()
    truth.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    gc.collect()
    torch.testing.assert_close(logits(model), logits(truth))
    assert not torch.equal(logits(model), before)
    assert held(model) == 12


class TestWhatSomeoneStillHas:
    """Is not taken from them: what they write there counts."""

    def test_a_parameter(self):
        model = made()
        kept = model.layers[1].ffn.proj_2.weight
        accelerate(model, prepack=ALONE)
        assert held(model) == 11 and model.layers[1].ffn.proj_2.weight is kept
        for factor in (2.0, 3.0):
            with torch.no_grad():
                kept.mul_(factor)
            truth = made()
            truth.load_state_dict(model.state_dict())
            torch.testing.assert_close(logits(model), logits(truth))
        del kept
        logits(model)
        assert held(model) == 12

    @pytest.mark.parametrize("way", [torch.Tensor.detach, lambda w: w.data, lambda w: w[3:5]])
    def test_its_memory(self, way):
        model = made()
        accelerate(model, prepack=ALONE)
        first = model.layers[1].ffn.proj_2
        kept = way(first.weight)
        with torch.no_grad():
            assert logits(model).isfinite().all() and held(model) == 11
            kept.mul_(2)
        truth = made()
        truth.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits(model), logits(truth))

    def test_an_optimizer(self):
        model = made()
        step = torch.optim.AdamW(model.parameters(), lr=0.1)
        accelerate(model, prepack=ALONE)
        assert held(model) == 0
        for _ in range(2):
            before = logits(model)
            model.loss(IDS, IDS).backward()
            step.step()
            step.zero_grad()
            truth = made()
            truth.load_state_dict(model.state_dict())
            torch.testing.assert_close(logits(model), logits(truth))
            assert not torch.equal(logits(model), before)

    @pytest.mark.parametrize("what", ["gradient", "hook", "after"])
    def test_what_hangs_on_it(self, what):
        model = made()
        weight, seen = model.layers[0].attn.out_proj.weight, []
        if what == "gradient":
            weight.grad = torch.ones_like(weight)
        elif what == "hook":
            weight.register_hook(seen.append)
        else:
            weight.register_post_accumulate_grad_hook(seen.append)
        del weight
        accelerate(model, prepack=ALONE)
        logits(model)
        assert held(model) == 11
        model.loss(IDS, IDS).backward()
        assert model.layers[0].attn.out_proj.weight.grad is not None
        assert len(seen) == (what != "gradient")


# In a process whose highest resident set is set back before each: what each takes beside the dense
# weights, in units of the largest matrix.
PEAK = """
import gc, json, torch
from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.acceleration.routines import measure_plan
from elmkernels.weights.prepacked import _give_back, held_of

torch.set_num_threads(1)
config = OpenELMConfig(
    num_transformer_layers=6, model_dim=1024, head_dim=64, num_gqa_groups=2, vocab_size=512,
    ffn_dim_divisor=256, ffn_multipliers=(1.0, 4.0), qkv_multipliers=(0.5, 1.0),
    normalize_qk_projections=True, share_input_output_layers=True, rope_max_length=64,
)
model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16).eval()
largest = max(p.nbytes for p in model.parameters())
ids = torch.arange(32)[None]

def forward(of):
    with torch.inference_mode():
        of(ids)

small = OpenELMConfig(
    num_transformer_layers=1, model_dim=64, head_dim=64, num_gqa_groups=1, vocab_size=512,
    ffn_dim_divisor=64, ffn_multipliers=1.0, qkv_multipliers=1.0,
    normalize_qk_projections=True, share_input_output_layers=True, rope_max_length=64,
)
other = OpenELM.from_config(small, seed=0, dtype=torch.bfloat16).eval()
accelerate(other, prepack="only")  # what a process does once
forward(other), forward(model)
gc.collect(), _give_back()

def now(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

start, found = now("VmRSS"), {}

def meter(name, call):
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    call()
    found[name] = now("VmHWM") - start

def ask(name):
    found = getattr(model, name)()
    if name == "parameters":
        for _ in found:
            pass

meter("accelerate", lambda: accelerate(model, prepack="only"))
assert sum(held_of(m) is not None for m in model.modules()) == 24
meter("forward", lambda: forward(model))
for name in ("state_dict", "train", "bfloat16", "parameters"):
    meter(name, lambda: ask(name))
    model.eval()
    meter(f"forward after {name}", lambda: forward(model))
meter("accelerate anew", lambda: accelerate(model, prepack="only"))
meter("restore", lambda: accelerate(model, prepack=False))
print(json.dumps([largest, found]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's /proc")
def test_peak_memory_is_that_of_dense_weights_and_one_matrix():
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    largest, found = json.loads(done.stdout)
    assert largest == 16 << 20
    # What a pass itself takes for activations and code is no weight: 14 MiB were seen.
    assert max(found.values()) <= largest + (16 << 20), found
