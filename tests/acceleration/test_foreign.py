"""Models of others' code, known by trying their modules; dtypes that the kernels don't take."""

import pytest
import torch
from helpers.checkpoints import CONFIG
from helpers.foreign import corenet, hugging_face
from torch import nn

from elmkernels import OpenELM, accelerate, ops
from elmkernels.openelm.layers import RMSNorm

IDS = torch.arange(2 * 9).view(2, 9) * 7 % CONFIG.vocab_size


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).norm() < 2e-5 * expected.norm()


class Scaled(nn.Module):
    """To be mixed in before a class: its forward, scaled."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
@pytest.mark.parametrize("place", ["", "attn", "ffn"])
@pytest.mark.parametrize("make", [corenet, hugging_face])
def test_foreign_classes_are_known_by_trying_them(make, place, layers):
    eager, fast = make(), make()
    for model in (eager, fast):
        body = getattr(model, "transformer", model)
        own = type(body.layers[0].get_submodule(place))
        scaled = type("ScaledOwn", (Scaled, own), {})
        for i in layers:
            body.layers[i].get_submodule(place).__class__ = scaled
    report = accelerate(fast)
    reasons = [reason for _, reason in report.left if "output is not" in reason]
    assert len(reasons) == len(layers)
    with torch.inference_mode():
        close(fast(IDS), eager(IDS))


def test_a_foreign_part_that_does_more_is_left():
    eager, fast = corenet(), corenet()
    for model in (eager, fast):
        model.layers[0].ffn.drop = nn.Dropout(0.1)
        model.layers[1].ffn.drop = nn.Dropout(0.0)
    left = dict(accelerate(fast).left)
    assert "another part, drop (Dropout)" in left["layers.0.ffn"] and "layers.1.ffn" not in left


@pytest.mark.parametrize("place", ["pos_embedding", "q_norm", "k_norm"])
@pytest.mark.parametrize("make", [corenet, hugging_face])
def test_hooks_in_a_foreign_attention_are_called(make, place):
    eager, fast = make(), make()
    accelerate(fast)
    for model in (eager, fast):
        attention = getattr(model, "transformer", model).layers[1].attn
        attention.get_submodule(place).register_forward_hook(
            lambda _, __, out: tuple(o * 1.5 for o in out) if isinstance(out, tuple) else out * 1.5
        )
    with torch.inference_mode():
        close(fast(IDS), eager(IDS))


def test_the_report_names_the_attention_that_runs():
    assert accelerate(hugging_face()).attention.startswith("sdpa with the model's mask")
    assert "mask" not in accelerate(corenet()).attention
    assert "mask" not in accelerate(OpenELM(CONFIG, seed=1)).attention


DTYPES = {
    "norms in bfloat16": (lambda m: [n.bfloat16() for n in m.modules() if isinstance(n, RMSNorm)],
                          torch.float32, None),
    "norms in float32": (lambda m: [n.float() for n in m.modules() if isinstance(n, RMSNorm)],
                         torch.bfloat16, None),
    "bfloat16 under float16": (lambda m: None, torch.bfloat16, torch.float16),
    "made float64 later": (lambda m: m.double(), torch.float32, None),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", DTYPES)
def test_what_the_kernels_do_not_take_runs_as_it_did(case, when):
    change, dtype, autocast = DTYPES[case]
    eager, fast = (OpenELM(CONFIG, seed=1, dtype=dtype) for _ in range(2))
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        change(model)
    if when == "before":
        if case == "made float64 later":
            with pytest.raises(ValueError, match=r"weight` is torch.float64, the kernels take"):
                accelerate(fast)
            return
        accelerate(fast)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        got, expected = fast(IDS), eager(IDS)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert (got - expected).double().norm() < 0.02 * expected.double().norm()
        (got.float().square().mean() + fast.loss(IDS, IDS)).backward()
    assert all(p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.parametrize(
    ("place", "name"), [("ffn", "gated"), ("attn", "backend"), ("", "backend")]
)
def test_a_name_of_its_own_is_never_hidden(place, name):
    eager, fast = corenet(), corenet()
    for model in (eager, fast):
        setattr(model.layers[1].get_submodule(place), name, "its own")
    left = dict(accelerate(fast).left)
    assert left[f"layers.1.{place}".rstrip(".")] == f"its own `{name}` would be hidden"
    assert getattr(fast.layers[1].get_submodule(place), name) == "its own"
    with torch.inference_mode():
        close(fast(IDS), eager(IDS))


class Swish(nn.SiLU):
    """CoreNet has an activation of its own."""


def test_an_activation_is_known_by_trying_it_and_called_if_hooked(monkeypatch):
    calls = []
    fused = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda *a, **k: calls.append(1) or fused(*a, **k))
    eager, fast = corenet(), corenet()
    for model in (eager, fast):
        for layer in model.layers:
            layer.ffn.act = Swish()
    accelerate(fast)
    del calls[:]
    with torch.inference_mode():
        close(fast(IDS), eager(IDS))
        assert len(calls) == len(fast.layers)
        for model in (eager, fast):
            model.layers[0].ffn.act.register_forward_hook(lambda _, __, out: out * 1.5)
        close(fast(IDS), eager(IDS))
        fast.layers[0].ffn.act = eager.layers[0].ffn.act = nn.GELU()
        close(fast(IDS), eager(IDS))
    assert len(calls) == 3 * len(fast.layers) - 2


def test_one_float64_weight_is_refused_by_its_name():
    model = OpenELM(CONFIG, seed=1)
    model.layers[1].ffn.proj_2.double()
    with pytest.raises(ValueError, match=r"`layers.1.ffn.proj_2.weight` is torch.float64"):
        accelerate(model)
