"""The reference model against the golden tensors, and everything torch may do to a model."""

import copy
import io
import pickle

import pytest
import torch
from helpers.golden import (
    GLU_FREE,
    assert_as_accurate,
    assert_matches,
    load_seeded_270m,
    load_tiny,
    logits_loss_gradients,
    seeded_weights,
)
from torch import nn

from elmkernels.openelm import KVCache, OpenELM, OpenELMConfig, greedy, next_token_loss
from elmkernels.reference import rope_table


def test_logits_loss_and_every_gradient(tiny):
    got = logits_loss_gradients(tiny.model(), tiny.tensors["input_ids"])
    assert got.keys() == tiny.expected.keys() == tiny.exact.keys()
    assert len(tiny.grads) == len(tiny.config.parameter_shapes())
    for name, tensor in got.items():
        assert_matches(tensor, tiny.expected[name], tiny.exact[name], name)


def test_bfloat16_logits(tiny):
    with torch.inference_mode():
        logits = tiny.model(torch.bfloat16)(tiny.tensors["input_ids"])
    assert_as_accurate(logits, tiny.tensors["logits_bf16"], tiny.exact["logits"])


def test_hugging_face_logits_and_loss(hf_tiny):
    got = logits_loss_gradients(hf_tiny.model(), hf_tiny.tensors["input_ids"])
    for name in ("logits", "loss"):
        assert_matches(got[name], hf_tiny.expected[name], hf_tiny.exact[name], name)
    with torch.inference_mode():
        logits = hf_tiny.model(torch.bfloat16)(hf_tiny.tensors["input_ids"])
    assert_as_accurate(logits, hf_tiny.tensors["logits_bf16"], hf_tiny.exact["logits"])


def test_hugging_face_greedy_tokens(hf_tiny):
    expected = hf_tiny.tensors["greedy_9_plus_24"]
    tokens = greedy(hf_tiny.model(), expected[:, :9], 24)
    assert torch.equal(tokens, expected[:, 9:])


def test_hugging_face_left_padded_batch(hf_tiny):
    model, t = hf_tiny.model(), hf_tiny.tensors
    ids, mask = t["padded_ids"], t["padded_mask"]
    assert mask.min() == 0, "the case must hold padding"
    with torch.inference_mode():
        last = model(ids, mask, logits_to_keep=1)[:, 0]
        exact = hf_tiny.model(torch.float64)(ids, mask, logits_to_keep=1)[:, 0]
    assert_matches(last, t["padded_last_logits"], exact)
    steps = t["padded_greedy"].shape[1] - ids.shape[1]
    assert torch.equal(greedy(model, ids, steps, mask), t["padded_greedy"][:, ids.shape[1] :])


def test_padding_changes_nothing(hf_tiny):
    """A row's logits in a padded batch are those it has alone, whatever the padding tokens are."""
    model, t = hf_tiny.model(torch.float64), hf_tiny.tensors
    ids, mask = t["padded_ids"].clone(), t["padded_mask"]
    ids[mask == 0] = 7
    with torch.inference_mode():
        logits = model(ids, mask)
        for row, real in enumerate(mask.sum(1).tolist()):
            alone = model(ids[row : row + 1, -real:])[0]
            torch.testing.assert_close(logits[row, -real:], alone)


def test_seeded_270m():
    case = load_seeded_270m()
    t = case.tensors
    outputs = []
    model = case.model()
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _x, y: outputs.append(y[0, -1]))
    with torch.inference_mode():
        logits = model(t["input_ids"])[:, t["positions"]]
    case.weights.clear()
    # bfloat16 is the yardstick's dtype; float32 must be far closer than that, in every layer.
    tight = (t["logits"] - t["logits_bf16"].float()).square().mean().sqrt() / 1000
    assert (logits - t["logits"]).square().mean().sqrt() <= tight
    layers = t["layer_output_last_token"]
    assert (torch.stack(outputs) - layers).abs().max() <= layers.abs().max() / 1e5
    with torch.inference_mode():
        half = model.bfloat16()(t["input_ids"])[:, t["positions"]]
    assert_as_accurate(half, t["logits_bf16"], t["logits"])


def test_logits_to_keep(tiny):
    model, ids = tiny.model(torch.float64), tiny.tensors["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=3), model(ids)[:, -3:])


def test_without_glu():
    """Every gradient of the plain feed-forward network, against float64 differences."""
    model = OpenELM(GLU_FREE, seed=1, dtype=torch.float64)
    ids = torch.randint(96, (1, 7), generator=torch.Generator().manual_seed(0))
    weight = model.layers[1].ffn.proj_1.weight
    loss = model(ids).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    step = 1e-6
    with torch.no_grad():
        weight.add_(direction, alpha=step)
        above = model(ids).square().sum()
        weight.sub_(direction, alpha=2 * step)
        below = model(ids).square().sum()
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step))


def test_compile_is_one_graph(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    expected = logits_loss_gradients(model, ids)
    torch._dynamo.reset()
    got = logits_loss_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    for name in ("logits", "loss"):
        torch.testing.assert_close(got[name], expected[name])
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        cache = KVCache(model.config, *ids.shape)
        parts = [compiled(ids[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 11))]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids[:, :11]))
    assert cache.length == 11


def test_compile_with_inductor():
    case = load_tiny("tiny_mha_untied")
    model, ids = case.model(), case.tensors["input_ids"]
    torch._dynamo.reset()
    with torch.inference_mode():
        logits = torch.compile(model, fullgraph=True)(ids)
    assert_matches(logits, case.tensors["logits"], case.exact["logits"])


def test_autocast(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        loss = next_token_loss(logits, ids)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert all(
        w.grad.dtype == torch.float32 and w.grad.isfinite().all() for w in model.parameters()
    )
    assert_as_accurate(logits.detach(), tiny.tensors["logits_bf16"], tiny.exact["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        tokens = greedy(model, ids[:, :4], 3)
    assert tokens.shape == (ids.shape[0], 3)


def test_gradient_checkpointing_is_bitwise_equal(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    plain = logits_loss_gradients(model, ids)
    calls = []
    model.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing = True
    recomputed = logits_loss_gradients(model, ids)
    assert len(calls) == 2, "the layer must run once more in the backward pass"
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name


def same_after(model: OpenELM, other: OpenELM, ids: torch.Tensor) -> None:
    assert other is not model
    assert other.rope_table.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))


def test_deepcopy_and_pickle(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    same_after(model, copy.deepcopy(model), ids)
    same_after(model, pickle.loads(pickle.dumps(model)), ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    same_after(model, torch.load(buffer, weights_only=False), ids)


def test_rope_table_is_float32_and_real_through_everything(tiny):
    expected = rope_table(4096, 32)
    model = tiny.model()
    for moved in (
        model,
        model.to(torch.bfloat16),
        model.half(),
        model.double(),
        model.to("meta").to_empty(device="cpu"),
        OpenELM(tiny.config, device="meta").to_empty(device="cpu"),
    ):
        assert torch.equal(moved.rope_table, expected)
        assert moved.rope_table.dtype == torch.float32
    assert not any("rope" in name for name in model.state_dict())
    with torch.device("meta"):
        meta = OpenELM(tiny.config)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, 256)


def test_rope_table_made_in_inference_mode_can_train(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    with torch.inference_mode():
        model(ids)
    model(ids).sum().backward()
    assert not model.rope_table.is_inference()


def test_initialization():
    config = OpenELMConfig.from_name("OpenELM-270M", num_transformer_layers=2, vocab_size=512)
    model = OpenELM.from_config(config, seed=3)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = weight.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "proj_2.weight")):
            std = (1280 * 2 * 2) ** -0.5
        assert weight.std().item() == pytest.approx(std, rel=0.01), name
        assert abs(weight.mean().item()) < 0.01 * std * 2, name
    again, other = OpenELM.from_config(config, seed=3), OpenELM.from_config(config, seed=4)
    name = "layers.1.ffn.proj_1.weight"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    assert not torch.equal(other.get_parameter(name), model.get_parameter(name))
    assert OpenELM.from_config(config, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_initialisation_without_a_seed_follows_the_default_generator():
    torch.manual_seed(5)
    first = OpenELM(GLU_FREE)
    torch.manual_seed(5)
    assert torch.equal(first.token_embeddings.weight, OpenELM(GLU_FREE).token_embeddings.weight)


def test_padding_index_gets_no_gradient_from_the_input():
    config = OpenELMConfig(
        num_transformer_layers=1, model_dim=64, head_dim=16, vocab_size=32, padding_index=5
    )
    model = OpenELM(config, seed=0)
    model(torch.tensor([[1, 5, 2]])).sum().backward()
    assert model.token_embeddings.weight.grad[5].abs().max() == 0
    assert model.token_embeddings.weight.grad[1].abs().max() > 0


def test_loss_with_padding():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    logp = logits.log_softmax(-1)
    pairs = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    expected = -torch.stack([logp[b, i, ids[b, i + 1]] for b, i in pairs]).mean()
    torch.testing.assert_close(next_token_loss(logits, ids, mask), expected)
    torch.testing.assert_close(
        next_token_loss(logits[1:], ids[1:], mask[1:]), next_token_loss(logits[1:], ids[1:])
    )
    assert next_token_loss(logits, ids, torch.zeros_like(mask)) == 0
    with pytest.raises(ValueError, match=r"input_ids must be \[2, 5\], got \[2, 4\]"):
        next_token_loss(logits, ids[:, :4])
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 5\], got \[2, 4\]"):
        next_token_loss(logits, ids, mask[:, :4])


def test_modules_are_replaceable_in_place(tiny):
    """The protocol: layer(x, context), attn(x, context), ffn(x), norm(x)."""

    class Recorder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, []

        def forward(self, x, *context):
            self.calls.append(context)
            return self.inner(x, *context)

    model, ids = tiny.model(), tiny.tensors["input_ids"]
    with torch.no_grad():
        expected = model(ids)
        layer = model.layers[0]
        layer.attn, layer.ffn = Recorder(layer.attn), Recorder(layer.ffn)
        model.layers[1], model.norm = Recorder(model.layers[1]), Recorder(model.norm)
        assert torch.equal(model(ids), expected)
    (context,) = layer.attn.calls[0]
    assert layer.ffn.calls == [()] and model.norm.calls == [()]
    assert model.layers[1].calls == [(context,)]
    assert context.key_mask is context.cache is context.slots is None
    assert context.positions.shape == ids.shape and context.positions.dtype == torch.int64


def tiny_model() -> OpenELM:
    return OpenELM(GLU_FREE, seed=0)


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (IDS.float(), {}, r"input_ids must be int64 or int32 .*got torch.float32 \[2, 5\]"),
        (IDS[0], {}, r"input_ids must be .*\[batch, length\], got torch.int64 \[5\]"),
        (IDS + 96, {}, r"input_ids must lie in \[0, 96\), got 96 to 96"),
        (IDS - 1, {}, r"input_ids must lie in \[0, 96\), got -1 to -1"),
        (IDS, {"attention_mask": IDS[:, :4]}, r"attention_mask must be \[2, 5\].*got \[2, 4\]"),
        (torch.zeros(1, 65, dtype=torch.int64), {}, "has 64 positions .* got 0 past . 65 new"),
        (IDS, {"logits_to_keep": -1}, "logits_to_keep must be at least 0, got -1"),
    ],
)
def test_refuses_inputs(ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids, **arguments)


def test_seeded_weights_depend_on_name_and_seed_only():
    weights = seeded_weights(GLU_FREE, 1)
    assert weights.keys() == GLU_FREE.parameter_shapes().keys()
    again = seeded_weights(GLU_FREE, 1)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert not torch.equal(seeded_weights(GLU_FREE, 2)["norm.weight"], weights["norm.weight"])


def test_a_variant_s_name_and_a_dtype_s_name():
    model = OpenELM.from_config("OpenELM-270M", dtype="bf16", device="meta")
    assert model.config == OpenELMConfig.from_name("OpenELM-270M")
    assert model.norm.weight.dtype == torch.bfloat16
    assert OpenELM(GLU_FREE, dtype="float32", device="meta").norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: OpenELM.from_config("OpenELM-1B"), ValueError, "OpenELM-1_1B"),
        (
            lambda: OpenELM({"model_dim": 64}),
            TypeError,
            "config must be an OpenELMConf.*got dict",
        ),
        (lambda: OpenELM(GLU_FREE, dtype="half"), ValueError, "dtype must be one of fp32.*'half'"),
        (lambda: OpenELM(GLU_FREE, dtype=torch.int8), ValueError, "dtype must be .*torch.int8"),
        (
            lambda: OpenELM(GLU_FREE)([[1, 2]]),
            TypeError,
            r"input_ids must be a tensor \[batch, length\].*got list",
        ),
    ],
)
def test_what_is_no_argument_of_a_model(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
