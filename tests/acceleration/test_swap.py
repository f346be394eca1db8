"""accelerate and restore: what is put in, what stays, what is refused, and what torch may do to a
model meanwhile.
"""

import copy
import io
import pickle

import pytest
import torch
from helpers.golden import (
    assert_as_accurate,
    assert_parity,
    load_tiny,
    logits_loss_gradients,
)
from torch import nn

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration import fused


def accelerated(model: nn.Module, **options) -> nn.Module:
    accelerate(model, **options)
    return model


def test_report_says_what_and_why(tiny):
    model = tiny.model()
    layers = tiny.config.num_transformer_layers
    report = accelerate(model, backend="reference")
    assert report.accelerated["layers"] == report.accelerated["attentions"] == layers
    assert report.accelerated["norms"] == layers + 1
    assert report.backends == dict.fromkeys(report.backends, "reference")
    assert not report.left
    assert "rms_norm: reference" in str(report)


def test_parameters_are_shared_and_restored(tiny):
    model = tiny.model()
    modules, parameters = dict(model.named_modules()), list(model.named_parameters())
    state = list(model.state_dict())
    accelerate(model)
    assert isinstance(model.layers[0], fused.FusedDecoderLayer)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == state
    for (a, p), (b, q) in zip(parameters, model.named_parameters(), strict=True):
        assert a == b and p is q
    accelerate(model)  # again: still one layer of swaps
    restore(model)
    assert dict(model.named_modules()) == modules
    assert [p for _, p in parameters] == list(model.parameters())
    with pytest.raises(ValueError, match="must be accelerated"):
        restore(model)


def test_restore_keeps_what_was_loaded_meanwhile(tiny):
    model, other = accelerated(tiny.model()), OpenELM(tiny.config, seed=3)
    model.load_state_dict(other.state_dict(), assign=True)
    restore(model)
    ids = tiny.tensors["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), other(ids), rtol=0, atol=0)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_work(tiny, copier):
    model, ids = accelerated(tiny.model(), prepack=True), tiny.tensors["input_ids"]
    with torch.inference_mode():
        expected = model(ids)
        if copier == "deepcopy":
            copied = copy.deepcopy(model)
        elif copier == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        assert torch.equal(copied(ids), expected)
    restore(copied)
    assert isinstance(model.layers[0], fused.FusedDecoderLayer)
    assert not isinstance(copied.layers[0], fused.FusedDecoderLayer)


def test_dtype_moves(tiny):
    model, ids = accelerated(tiny.model()).bfloat16(), tiny.tensors["input_ids"]
    with torch.inference_mode():
        assert_as_accurate(model(ids), tiny.tensors["logits_bf16"], tiny.exact["logits"])
    assert model.to("meta").layers[0].attn_norm.weight.device.type == "meta"


class TestRefusals:
    """A model that isn't known stays as it was, and the error says why."""

    def refused(self, model: nn.Module, message: str, **options) -> None:
        before = {name: type(m) for name, m in model.named_modules()}
        with pytest.raises((ValueError, RuntimeError), match=message):
            accelerate(model, **options)
        assert {name: type(m) for name, m in model.named_modules()} == before

    def test_not_a_model(self):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            accelerate("OpenELM-270M")

    def test_unknown_layout(self):
        self.refused(nn.Sequential(nn.Linear(4, 4)), "has no `layers`")
        model = load_tiny("tiny_layerwise").model()
        del model.layers[2].ffn_norm
        self.refused(model, r"has no `layers.2.ffn_norm`")

    def test_another_norm(self):
        model = load_tiny("tiny_layerwise").model()
        model.layers[1].attn_norm = nn.LayerNorm(128, bias=False)
        self.refused(model, r"`layers.1.attn_norm`: its output is not RMSNorm's")

    def test_another_call(self):
        class Other(nn.Module):
            def forward(self, x, rope):
                return x

        model = load_tiny("tiny_layerwise").model()
        other = Other()
        other._modules = model.layers[0].attn._modules
        model.layers[0].attn = other
        self.refused(model, r"forward takes \(self, x, rope\)")

    def test_wrong_heads(self):
        model = load_tiny("tiny_layerwise").model()
        model.layers[0].attn.kv_heads += 1
        self.refused(model, "qkv_proj gives")

    def test_backends(self):
        model = load_tiny("tiny_layerwise").model()
        self.refused(model, "backend must be one of", backend="mkl")
        self.refused(model, "can't run here|runs .* on cuda|no kernels", backend="cuda")

    def test_what_is_left_is_named(self):
        model = load_tiny("tiny_layerwise").model()
        calls = []
        model.layers[1].ffn.register_forward_hook(lambda *_: calls.append(1))
        model.layers[2].register_forward_hook(lambda *_: calls.append(2))

        class Adapter(nn.Linear):
            pass

        model.layers[0].attn.out_proj.__class__ = Adapter
        report = accelerate(model)
        left = dict(report.left)
        assert "hooks" in left["layers.1.ffn"] and "hooks" in left["layers.2"]
        assert left["layers.0.attn.out_proj"] == "Adapter is not nn.Linear"
        assert report.accelerated["layers"] == len(model.layers)
        case = load_tiny("tiny_layerwise")
        got = logits_loss_gradients(model, case.tensors["input_ids"])
        for name, tensor in got.items():
            assert_parity(tensor, case.expected[name], case.exact[name], name)
        assert sorted(calls) == [1, 2]
