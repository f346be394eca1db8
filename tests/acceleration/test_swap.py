"""accelerate and restore: the golden tensors once more, and everything torch may do to a model."""

import copy
import io
import pickle

import pytest
import torch
from helpers.foreign import Cache, CoreNetModel, HuggingFaceModel
from helpers.golden import (
    GLU_FREE,
    assert_as_accurate,
    load_hf_tiny,
    load_seeded_270m,
    load_tiny,
    logits_loss_gradients,
)
from torch import nn

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration import fused
from elmkernels.acceleration.projections import ONEDNN, PREPACKED, Linear, Plan
from elmkernels.backends import BACKENDS
from elmkernels.openelm import KVCache, greedy
from elmkernels.testing.parity import ATTENTION_SLACK, compare

CPU_BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            BACKENDS[name].missing is not None, reason=str(BACKENDS[name].missing)
        ),
    )
    for name in ("avx512_bf16", "avx512", "avx2", "reference")
]


def assert_matches(got, golden, exact, what: str = "tensor") -> None:
    """The project's rule of parity, with the golden tensor as the reference's own error."""
    comparison = compare(exact, golden, got, what, slack=ATTENTION_SLACK)
    assert comparison.ok, f"{what}: {comparison.reason}"


def accelerated(model: nn.Module, **options) -> nn.Module:
    accelerate(model, **options)
    return model


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_logits_loss_and_every_gradient(tiny, backend):
    model = accelerated(tiny.model(), backend=backend)
    got = logits_loss_gradients(model, tiny.tensors["input_ids"])
    assert got.keys() == tiny.expected.keys()
    for name, tensor in got.items():
        assert_matches(tensor, tiny.expected[name], tiny.exact[name], name)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bfloat16_logits(tiny, backend):
    model = accelerated(tiny.model(torch.bfloat16), backend=backend)
    with torch.inference_mode():
        logits = model(tiny.tensors["input_ids"])
    assert_as_accurate(logits, tiny.tensors["logits_bf16"], tiny.exact["logits"])


@pytest.mark.parametrize("prepack", [False, True])
def test_cached_decoding(tiny, prepack):
    model = accelerated(tiny.model(), prepack=prepack).eval()
    ids, prefix = tiny.tensors["input_ids"], tiny.decode_prefix
    cache = KVCache(tiny.config, ids.shape[0], ids.shape[1])
    with torch.inference_mode():
        logits = [model(ids[:, :prefix], cache=cache)]
        logits += [model(ids[:, i : i + 1], cache=cache) for i in range(prefix, ids.shape[1])]
        expected = tiny.tensors["decode_logits"]
        assert_matches(torch.cat(logits, 1), expected, tiny.exact["logits"], "decode_logits")
        cache.truncate(prefix)
        chunk = model(ids[:, prefix:], cache=cache)
    assert_matches(chunk, expected[:, prefix:], tiny.exact["logits"][:, prefix:], "a chunk")


def test_hugging_face_folder(hf_tiny):
    model, t = accelerated(hf_tiny.model()), hf_tiny.tensors
    expected = t["greedy_9_plus_24"]
    assert torch.equal(greedy(model, expected[:, :9], 24), expected[:, 9:])
    ids, mask = t["padded_ids"], t["padded_mask"]
    with torch.inference_mode():
        last = model(ids, mask, logits_to_keep=1)[:, 0]
        exact = hf_tiny.model(torch.float64)(ids, mask, logits_to_keep=1)[:, 0]
    assert_matches(last, t["padded_last_logits"], exact)
    steps = t["padded_greedy"].shape[1] - ids.shape[1]
    assert torch.equal(greedy(model, ids, steps, mask), t["padded_greedy"][:, ids.shape[1] :])


def test_seeded_270m():
    case = load_seeded_270m()
    model, t = accelerated(case.model()), case.tensors
    with torch.inference_mode():
        logits = model(t["input_ids"])[:, t["positions"]]
        restore(model)
        tight = (t["logits"] - t["logits_bf16"].float()).square().mean().sqrt() / 1000
        assert (logits - t["logits"]).square().mean().sqrt() <= tight
        half = accelerated(model.bfloat16())(t["input_ids"])[:, t["positions"]]
    assert_as_accurate(half, t["logits_bf16"], t["logits"])


@pytest.mark.parametrize("name", ["tiny_layerwise", "tiny_mha_untied"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_corenet_calls(name, accelerated):
    case = load_tiny(name)
    model = CoreNetModel(case.config)
    model.load_state_dict(case.weights)
    if accelerated:
        report = accelerate(model)
        assert report.convention == "CoreNet"
        assert report.accelerated["layers"] == len(model.layers)
        projections = 4 * len(model.layers) + (model.classifier is not None)
        assert report.accelerated["projections"] == projections
    got = logits_loss_gradients(model, case.tensors["input_ids"])
    for key, tensor in got.items():
        assert_matches(tensor, case.expected[key], case.exact[key], key)
    ids, prefix, keys, values, logits = case.tensors["input_ids"], case.decode_prefix, [], [], []
    with torch.inference_mode():
        for chunk in (ids[:, :prefix], *ids[:, prefix:].split(1, dim=1)):
            call = {"input_ids": chunk, "past_keys": keys, "past_values": values}
            out = model(call | {"is_causal": chunk.shape[1] > 1})
            keys, values = out["past_keys"], out["past_values"]
            logits.append(out["logits"])
    assert_matches(torch.cat(logits, 1), case.tensors["decode_logits"], case.exact["logits"])
    for i in range(len(model.layers)):
        assert keys[i].shape == case.tensors[f"cache_k.{i}"].shape
        torch.testing.assert_close(values[i], case.tensors[f"cache_v.{i}"])


@pytest.mark.parametrize("accelerated", [False, True])
def test_hugging_face_calls(hf_tiny, accelerated):
    model, t = HuggingFaceModel(hf_tiny.config), hf_tiny.tensors
    model.transformer.load_state_dict(hf_tiny.weights)
    if accelerated:
        report = accelerate(model)
        assert report.convention == "Hugging Face"
        assert [path for path, _ in report.left] == ["the output projection"]
    got = logits_loss_gradients(model, t["input_ids"])
    assert_matches(got["logits"], t["logits"], hf_tiny.exact["logits"], "logits")
    tokens, mask = t["padded_ids"], t["padded_mask"]
    steps, cache, chunk = t["padded_greedy"].shape[1] - tokens.shape[1], Cache(), tokens
    with torch.inference_mode():
        for _ in range(steps):
            last = model(chunk, mask, cache)[:, -1:]
            chunk = last.argmax(-1)
            tokens = torch.cat((tokens, chunk), 1)
            mask = torch.cat((mask, torch.ones_like(chunk)), 1)
    assert torch.equal(tokens, t["padded_greedy"])


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


def test_float16_where_onednn_may_not_take_it(tiny):
    """Measured for it, or for another dtype before."""
    ids = tiny.tensors["input_ids"]
    named = Plan(*[ONEDNN] * 4)
    models = accelerated(tiny.model(torch.float16)), accelerated(tiny.model(), plan=named).half()
    with torch.inference_mode():
        expected = tiny.model(torch.float16)(ids)
        for model in models:
            assert_as_accurate(model(ids), expected, tiny.exact["logits"])
    named = models[1].train()
    named(ids).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in named.parameters() if p.grad is not None)


def test_compile_is_one_graph(tiny):
    model, ids = accelerated(tiny.model()), tiny.tensors["input_ids"]
    got = logits_loss_gradients(torch.compile(model, fullgraph=True), ids)
    for name, expected in tiny.exact.items():
        compiled = got[name.replace("grad.", "grad._orig_mod.")]
        assert_matches(compiled, tiny.expected[name], expected, name)


def test_autocast_training(tiny):
    """Under autocast the accelerated model may be no further from float64 than eager is."""
    results = []
    for accelerated in (False, True):
        model = accelerated(tiny.model()) if accelerated else tiny.model()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(logits_loss_gradients(model, tiny.tensors["input_ids"]))
    eager, fast = results
    assert fast["logits"].dtype == eager["logits"].dtype
    for name, tensor in fast.items():
        if name != "loss":
            assert_as_accurate(tensor, eager[name], tiny.exact[name], name)


def test_gradient_checkpointing(tiny):
    model, ids = accelerated(tiny.model()), tiny.tensors["input_ids"]
    kept = logits_loss_gradients(model, ids)
    model.gradient_checkpointing = True
    recomputed = logits_loss_gradients(model, ids)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_without_glu():
    """No golden file has a plain feed-forward network: the reference model is the measure."""
    case = load_tiny("tiny_layerwise")
    ids = case.tensors["input_ids"] % GLU_FREE.vocab_size
    exact = OpenELM(GLU_FREE, seed=1).double()
    eager, fast = OpenELM(GLU_FREE, seed=1), accelerated(OpenELM(GLU_FREE, seed=1))
    exact, eager, fast = (logits_loss_gradients(m, ids) for m in (exact, eager, fast))
    for name, tensor in fast.items():
        assert_matches(tensor, eager[name], exact[name], name)


def test_plan_for_amd_trains_the_same(tiny):
    """oneDNN's products, forward and backward, whether or not this processor prefers them."""
    model = accelerated(tiny.model())
    for module in model.modules():
        if hasattr(module, "products"):
            module.products.plan = Plan(ONEDNN, ONEDNN, ONEDNN, ONEDNN)
    got = logits_loss_gradients(model, tiny.tensors["input_ids"])
    for name, tensor in got.items():
        assert_matches(tensor, tiny.expected[name], tiny.exact[name], name)


class TestPackedWeights:
    """A packed copy never outlives the weight it was made from."""

    plan = Plan(PREPACKED, PREPACKED, PREPACKED)

    def make(self) -> tuple[Linear, torch.Tensor]:
        original = nn.Linear(64, 48, bias=False)
        return Linear(original, self.plan), torch.randn(3, 64)

    def check(self, layer: Linear, x: torch.Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert layer.products.nbytes in (0, layer.weight.nbytes)

    def test_it_is_used(self):
        layer, x = self.make()
        self.check(layer, x)
        assert layer.products.nbytes == layer.weight.nbytes

    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_optimiser_steps(self, options, set_to_none):
        layer, x = self.make()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        for _ in range(3):
            self.check(layer, x)
            layer(x).square().sum().backward()
            self.check(layer, x)  # an evaluation between backward and step
            optimizer.step()
            self.check(layer, x)
            optimizer.zero_grad(set_to_none=set_to_none)
            self.check(layer, x)

    def test_loads_and_moves(self):
        layer, x = self.make()
        for change in (
            lambda: layer.load_state_dict({"weight": torch.randn(48, 64)}),
            lambda: layer.load_state_dict({"weight": torch.randn(48, 64)}, assign=True),
            lambda: nn.init.normal_(layer.weight),
        ):
            self.check(layer, x)
            change()
            self.check(layer, x)
        layer.bfloat16()
        with torch.no_grad():
            expected = nn.functional.linear(x.bfloat16(), layer.weight)
            assert_as_accurate(layer(x.bfloat16()), expected, (x @ layer.weight.float().T).double())

    def test_training_drops_it(self):
        layer, x = self.make()
        self.check(layer, x)
        layer.train()
        assert layer.products.nbytes == 0


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
        assert report.accelerated["layers"] == len(model.layers) - 1
        case = load_tiny("tiny_layerwise")
        got = logits_loss_gradients(model, case.tensors["input_ids"])
        for name, tensor in got.items():
            assert_matches(tensor, case.expected[name], case.exact[name], name)
        assert sorted(calls) == [1, 2]


def test_hf_tiny_is_the_same_model_everywhere():
    """The loaded folder, accelerated: logits and loss as Apple's Hugging Face code printed them."""
    case = load_hf_tiny()
    got = logits_loss_gradients(accelerated(case.model()), case.tensors["input_ids"])
    for name in ("logits", "loss"):
        assert_matches(got[name], case.expected[name], case.exact[name], name)
