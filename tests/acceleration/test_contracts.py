"""What accelerate promises of a model that it refuses, and a conversion of one that is accelerated:
it stays accelerated, as it was.
"""

from dataclasses import replace

import pytest
import torch
from helpers.golden import load_tiny
from torch import nn

from elmkernels import OpenELM, accelerate, backends, pack, quantize, restore, unpack
from elmkernels.acceleration import swap
from elmkernels.acceleration.routines import LINEAR, MV, ONEDNN, PREPACKED, Plan
from elmkernels.backends import BACKENDS, choose
from elmkernels.openelm.compressed import Compressed, CompressedLinear
from elmkernels.surgery import mark_of

PLAN = Plan(MV, ONEDNN, PREPACKED, LINEAR)
IDS = torch.arange(12).view(1, 12)


def model_of(dtype: torch.dtype = torch.bfloat16) -> OpenELM:
    return load_tiny("tiny_layerwise").model(dtype)


def state_of(model: nn.Module) -> dict:
    """All that may not change: each module and its class, what it is given, hooks, the mark."""
    known = ("backend", "training", "_fused")
    found = {
        name: (id(m), type(m), {k: id(vars(m).get(k)) for k in known}, dict(m._forward_hooks))
        for name, m in model.named_modules()
    }
    return {
        "modules": found,
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "mark": mark_of(model),
    }


def accelerated() -> OpenELM:
    """Partly quantized, with a named backend, a plan of its own, and a hook on a fused module."""
    model = quantize_some(model_of())
    accelerate(model, backend=choose("rms_norm", "cpu", None), plan=PLAN)
    model.layers[1].ffn.register_forward_hook(lambda *_: None)
    return model.eval()


def quantize_some(model: OpenELM) -> OpenELM:
    """Quantized but for one projection."""
    kept = model.layers[0].ffn.proj_1
    quantize(model, 8, 32, progress=False)
    model.layers[0].ffn.proj_1 = kept
    return model


def another_norm(model: OpenELM) -> None:
    norm = nn.LayerNorm(model.config.model_dim, bias=False, dtype=torch.bfloat16)
    model.layers[2].ffn_norm = norm


REFUSED = {
    "an unknown backend": ({"backend": "typo"}, None, "backend must be one of"),
    "a backend of no type": ({"backend": 3}, None, "backend must be a name or None, got int"),
    "a backend that can't run here": ({"backend": "cuda"}, None, "can't run here|runs .* on cuda"),
    "a plan of no type": ({"plan": "fast"}, None, "plan must be a Plan or None, got str"),
    "an unknown layout": ({}, another_norm, "layers.2.ffn_norm`: its output is not RMSNorm's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_model_stays_accelerated_as_it_was(case):
    options, change, message = REFUSED[case]
    model = accelerated()
    if change is not None:
        change(model)
    before = state_of(model)
    with torch.inference_mode():
        expected = model(IDS)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        accelerate(model, **options)
    assert state_of(model) == before
    assert any(m.backend is not None for m in model.modules() if isinstance(m, Compressed))
    with torch.inference_mode():
        assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("again", [False, True], ids=["reference", "accelerated"])
@pytest.mark.parametrize("place", ["measure_plan", "_report"])
def test_a_failure_half_way_undoes_itself(monkeypatch, place, again):
    model = accelerated() if again else quantize_some(model_of())
    before = state_of(model)

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(swap, place, fail)
    with pytest.raises(MemoryError, match="no room"):
        accelerate(model)
    assert state_of(model) == before


def test_a_model_without_a_norm_is_refused_by_its_layout():
    model = model_of()
    del model.norm
    with pytest.raises(ValueError, match="it has no `norm`"):
        accelerate(model)


def fresh_packed() -> OpenELM:
    model = model_of()
    pack(model, progress=False)
    return model


CONVERSIONS = {
    "pack": (model_of, lambda model: pack(model, progress=False)),
    "quantize": (model_of, lambda model: quantize(model, 8, 32, progress=False)),
    "unpack": (fresh_packed, lambda model: unpack(model, progress=False)),
    "a refused quantize": (model_of, lambda model: quantize(model, 8, 96, progress=False)),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("prepack", [None, False, True])
@pytest.mark.parametrize("plan", [None, PLAN], ids=["measured", "given"])
def test_a_conversion_keeps_what_accelerate_was_given(monkeypatch, conversion, plan, prepack):
    make, convert = CONVERSIONS[conversion]
    model, name = make(), choose("rms_norm", "cpu", None)
    measured = Plan(few_rows=ONEDNN)
    monkeypatch.setattr(swap, "measure_plan", lambda dtype, prepack: measured)
    arguments = {"backend": name, "prepack": prepack, "plan": plan}
    accelerate(model, **arguments)
    if conversion.startswith("a refused"):
        with pytest.raises(ValueError, match="group_size must be"):
            convert(model)
    else:
        convert(model)
    assert mark_of(model).arguments == {**arguments, "activations": None}
    assert model.norm.backend == model.layers[0].attn.attention_backend == name
    plans = {m.plan for m in model.modules() if isinstance(m, swap.projections.Linear)}
    plans |= {model.tied_head.products.plan}
    assert plans == {plan or measured}
    assert {m.backend for m in model.modules() if isinstance(m, CompressedLinear)} <= {name}
    restore(model)
    assert mark_of(model) is None


def test_a_report_names_kernels_that_are_missing(monkeypatch):
    reason = "no compiled kernels: not built; reinstall with: pip install elmkernels"
    monkeypatch.setattr(swap, "missing_kernels", lambda device: reason)
    report = accelerate(model_of())
    assert report.missing == reason and str(report).splitlines()[0] == reason
    assert accelerate(model_of(), backend="reference").missing is None
    monkeypatch.setattr(swap, "missing_kernels", lambda device: None)
    report = accelerate(model_of())
    assert report.missing is None and str(report).startswith("accelerated (elmkernels model)")


def test_kernels_are_missing_if_no_backend_of_the_device_is_there(monkeypatch):
    """Of a CPU the least demanding library's reason is told, of a GPU each one's."""
    ours = [b for b in BACKENDS.values() if b.name not in backends.COMPOSED]
    for b in ours:
        monkeypatch.setitem(BACKENDS, b.name, replace(b, missing=f"no {b.name} here"))
    assert backends.missing_kernels("cpu") == "no compiled kernels: no avx2 here"
    on_gpu = backends.missing_kernels("cuda")
    assert on_gpu == "no compiled kernels: no triton here; no cuda here"
    for name in ("avx512", "triton"):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], missing=None))
    assert backends.missing_kernels("cpu") is backends.missing_kernels("cuda") is None
