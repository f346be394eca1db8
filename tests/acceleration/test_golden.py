"""Accelerated models give the golden tensors once more, by every backend and in every call."""

import pytest
import torch
from helpers.foreign import Cache, CoreNetModel, HuggingFaceModel
from helpers.golden import (
    GLU_FREE,
    assert_as_accurate,
    assert_parity,
    load_hf_tiny,
    load_seeded_270m,
    load_tiny,
    logits_loss_gradients,
)
from torch import nn

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration.routines import ONEDNN, Plan
from elmkernels.backends import BACKENDS
from elmkernels.openelm import KVCache, greedy

CPU_BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            BACKENDS[name].missing is not None, reason=str(BACKENDS[name].missing)
        ),
    )
    for name in ("avx512_bf16", "avx512", "avx2", "reference")
]


def accelerated(model: nn.Module, **options) -> nn.Module:
    accelerate(model, **options)
    return model


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_logits_loss_and_every_gradient(tiny, backend):
    model = accelerated(tiny.model(), backend=backend)
    got = logits_loss_gradients(model, tiny.tensors["input_ids"])
    assert got.keys() == tiny.expected.keys()
    for name, tensor in got.items():
        assert_parity(tensor, tiny.expected[name], tiny.exact[name], name)


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
        assert_parity(torch.cat(logits, 1), expected, tiny.exact["logits"], "decode_logits")
        cache.truncate(prefix)
        chunk = model(ids[:, prefix:], cache=cache)
    assert_parity(chunk, expected[:, prefix:], tiny.exact["logits"][:, prefix:], "a chunk")


def test_hugging_face_folder(hf_tiny):
    model, t = accelerated(hf_tiny.model()), hf_tiny.tensors
    expected = t["greedy_9_plus_24"]
    assert torch.equal(greedy(model, expected[:, :9], 24), expected[:, 9:])
    ids, mask = t["padded_ids"], t["padded_mask"]
    with torch.inference_mode():
        last = model(ids, mask, logits_to_keep=1)[:, 0]
        exact = hf_tiny.model(torch.float64)(ids, mask, logits_to_keep=1)[:, 0]
    assert_parity(last, t["padded_last_logits"], exact)
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
        assert report.accelerated["models"] == 1 and not report.left
    got = logits_loss_gradients(model, case.tensors["input_ids"])
    for key, tensor in got.items():
        assert_parity(tensor, case.expected[key], case.exact[key], key)
    ids, prefix, logits = case.tensors["input_ids"], case.decode_prefix, []
    keys = values = None
    with torch.inference_mode():
        for chunk in (ids[:, :prefix], *ids[:, prefix:].split(1, dim=1)):
            call = {"input_ids": chunk, "past_keys": keys, "past_values": values}
            out = model(call | {"use_kv_cache": True, "is_causal": chunk.shape[1] > 1})
            keys, values = out["past_keys"], out["past_values"]
            logits.append(out["logits"])
    assert_parity(torch.cat(logits, 1), case.tensors["decode_logits"], case.exact["logits"])
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
        left = [path for path, _ in report.left]
        assert left == ["transformer", "the model", "the output projection"]
    got = logits_loss_gradients(model, t["input_ids"])
    assert_parity(got["logits"], t["logits"], hf_tiny.exact["logits"], "logits")
    tokens, mask = t["padded_ids"], t["padded_mask"]
    steps, cache, chunk = t["padded_greedy"].shape[1] - tokens.shape[1], Cache(), tokens
    with torch.inference_mode():
        for _ in range(steps):
            last = model(chunk, mask, cache)[:, -1:]
            chunk = last.argmax(-1)
            tokens = torch.cat((tokens, chunk), 1)
            mask = torch.cat((mask, torch.ones_like(chunk)), 1)
    assert torch.equal(tokens, t["padded_greedy"])


def test_autocast_training(tiny):
    """Under autocast the accelerated model may be no further from float64 than eager is."""
    results = []
    for model in (tiny.model(), accelerated(tiny.model())):
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
        assert_parity(tensor, eager[name], exact[name], name)


def test_plan_for_amd_trains_the_same(tiny):
    """oneDNN's products, forward and backward, whether or not this processor prefers them."""
    model = accelerated(tiny.model())
    for module in model.modules():
        if hasattr(module, "products"):
            module.products.plan = Plan(ONEDNN, ONEDNN, ONEDNN, ONEDNN)
    got = logits_loss_gradients(model, tiny.tensors["input_ids"])
    for name, tensor in got.items():
        assert_parity(tensor, tiny.expected[name], tiny.exact[name], name)


def test_compile_is_one_graph(tiny):
    model, ids = accelerated(tiny.model()), tiny.tensors["input_ids"]
    got = logits_loss_gradients(torch.compile(model, fullgraph=True), ids)
    for name, expected in tiny.exact.items():
        compiled = got[name.replace("grad.", "grad._orig_mod.")]
        assert_parity(compiled, tiny.expected[name], expected, name)


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


def test_hf_tiny_is_the_same_model_everywhere():
    """The loaded folder, accelerated: logits and loss as Apple's Hugging Face code printed them."""
    case = load_hf_tiny()
    got = logits_loss_gradients(accelerated(case.model()), case.tensors["input_ids"])
    for name in ("logits", "loss"):
        assert_parity(got[name], case.expected[name], case.exact[name], name)
