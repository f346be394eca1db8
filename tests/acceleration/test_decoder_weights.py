"""A model as data: what it holds, when it is made again, what can't be described, and the step of
decoding that uses it where there is an op for it.
"""

import copy
import gc
import weakref

import pytest
import torch
from helpers.checkpoints import CONFIG
from helpers.golden import GLU_FREE, load_hf_tiny, load_tiny
from torch import Tensor, nn
from torch.nn import functional as F

from elmkernels import ops, reference
from elmkernels.openelm import (
    KVCache,
    OpenELM,
    accelerate,
    decoder_weights_of,
    generate,
    greedy,
    next_logits,
    restore,
)
from elmkernels.testing import model_parity
from elmkernels.weights.formats import Affine, Arena, DecoderWeights


def plain_step(
    weights: DecoderWeights,
    tokens: Tensor,
    positions: Tensor,
    arena: Arena,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step by the references, from the data alone."""
    x = F.embedding(tokens, reference.dense(weights.embedding))[:, None]
    rows = torch.arange(len(tokens))
    for i, w in enumerate(weights.layers):
        k_cache, v_cache = arena.views(i, w.kv_heads)
        normed = reference.rms_norm(x, w.attn_norm, weights.eps)
        q, k, v = reference.qk_norm_rope(
            reference.linear(normed, w.qkv_proj), w.q_norm, w.k_norm, positions[:, None],
            w.q_heads, w.kv_heads, weights.rope_table, weights.eps,
        )  # fmt: skip
        k_cache[rows, positions], v_cache[rows, positions] = k[:, 0], v[:, 0]
        out = reference.attention(q, k_cache, v_cache, offsets=positions)
        x = x + reference.linear(out.flatten(-2), w.out_proj)
        h = reference.linear(reference.rms_norm(x, w.ffn_norm, weights.eps), w.proj_1)
        h = reference.swiglu(h) if weights.gated else F.silu(h)
        x = x + reference.linear(h, w.proj_2)
    return reference.linear(reference.rms_norm(x, weights.norm, weights.eps), weights.head)[:, 0]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """`ops.decode_step` as plain_step, and what it was called with."""
    calls = []

    def decode_step(weights, tokens, positions, arena, *, chosen=None, backend=None):
        calls.append({"weights": weights, "positions": positions.tolist(), "backend": backend})
        return plain_step(weights, tokens, positions, arena)

    monkeypatch.setattr(ops, "decode_step", decode_step, raising=False)
    return calls


def model_of(name: str) -> OpenELM:
    models = {
        "tied, normalized": lambda: OpenELM(CONFIG, seed=1),
        "tied, no gate": lambda: OpenELM(GLU_FREE, seed=1),
        "untied": lambda: load_tiny("tiny_mha_untied").model(),
        "hf_tiny": lambda: load_hf_tiny().model(),
    }
    return models[name]()


NAMES = ("tied, normalized", "tied, no gate", "untied", "hf_tiny")


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_the_model(name, accelerated):
    """The data alone gives the model's logits, token by token, in rows of different lengths."""
    model = model_of(name).double() if not accelerated else model_of(name)
    dtype = model.norm.weight.dtype
    exact = copy.deepcopy(model).double()
    if accelerated:
        accelerate(model)
    weights = decoder_weights_of(model)
    assert (
        weights.vocab_size == model.config.vocab_size
        and weights.model_dim == model.config.model_dim
    )
    assert (weights.head is weights.embedding) == model.config.share_input_output_layers
    heads = [(layer.q_heads, layer.kv_heads) for layer in weights.layers]
    config = model.config
    assert heads == list(zip(config.num_query_heads, config.num_kv_heads, strict=True))
    ids = torch.randint(0, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    cache, truth = (KVCache(model.config, 2, 12, dtype=d) for d in (dtype, torch.float64))
    with torch.inference_mode():
        for run, kept in ((model, cache), (exact, truth)):
            run(ids[:, :3], cache=kept, counts=[3, 1])
        for i in range(3, 6):
            got = plain_step(weights, ids[:, i], cache.lengths, cache.arena)
            cache.advance(1)
            expected = exact(ids[:, i : i + 1], cache=truth)[:, 0]
            torch.testing.assert_close(
                got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
            )


def test_no_weight_is_copied():
    model = model_of("untied")
    accelerate(model)
    weights = decoder_weights_of(model)
    layer = model.layers[1]
    assert weights.embedding is model.token_embeddings.weight
    assert weights.head is model.classifier.weight
    assert weights.layers[1].proj_2 is layer.ffn.proj_2.weight
    assert weights.rope_table is model.rope_table and weights.rope_table.device.type == "cpu"


def change_weight(model: OpenELM) -> None:
    model.layers[1].ffn.proj_1.weight = nn.Parameter(model.layers[1].ffn.proj_1.weight * 2)


def change_data(model: OpenELM) -> None:
    model.layers[0].attn_norm.weight.data = model.layers[0].attn_norm.weight.data.clone()


def change_module(model: OpenELM) -> None:
    model.layers[0].ffn.proj_1 = copy.deepcopy(model.layers[0].ffn.proj_1)


@pytest.mark.parametrize(
    "change",
    [change_weight, change_data, change_module, accelerate, lambda m: m.bfloat16()],
    ids=["weight", "data", "module", "accelerate", "dtype"],
)
def test_it_is_made_once_and_again_after_a_change(change):
    model = model_of("tied, normalized")
    weights = decoder_weights_of(model)
    assert decoder_weights_of(model) is weights
    with torch.no_grad():
        model.layers[0].ffn.proj_1.weight.mul_(2)  # in place: the same data describes it
    assert decoder_weights_of(model) is weights
    change(model)
    assert decoder_weights_of(model) is not weights
    assert decoder_weights_of(model) is decoder_weights_of(model)


def test_no_description_keeps_its_model():
    model = model_of("tied, normalized")
    decoder_weights_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_is_described_by_its_own_weights():
    model = model_of("tied, normalized")
    decoder_weights_of(model)
    other = copy.deepcopy(model)
    assert decoder_weights_of(other).norm is other.norm.weight is not model.norm.weight


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 1.5


def adapt(model: OpenELM) -> None:
    model.layers[1].attn.qkv_proj = Adapter(model.layers[1].attn.qkv_proj)


def subclass(model: OpenELM) -> None:
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.layers[0].ffn.proj_2.__class__ = Doubled


def hook(model: OpenELM) -> None:
    model.layers[0].ffn.register_forward_hook(lambda _m, _a, out: out)


def patch(model: OpenELM) -> None:
    model.layers[0].forward = lambda x, context: x


def widen_eps(model: OpenELM) -> None:
    model.layers[0].ffn_norm.eps = 1e-3


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapt, r"layers.1.attn.qkv_proj must be Linear, got Adapter"),
        (subclass, r"layers.0.ffn.proj_2 must be Linear, got Doubled"),
        (hook, r"layers.0.ffn has hooks"),
        (patch, r"layers.0 has hooks or a forward of its own"),
        (widen_eps, r"layers.0.ffn_norm must have the eps of the others, 1e-06, got 0.001"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_described(step, change, message, accelerated):
    """It is refused, also if it was known before, and decoding goes through the model."""
    model = model_of("tied, normalized")
    if accelerated:
        accelerate(model)
    decoder_weights_of(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        decoder_weights_of(model)
    cache, other = KVCache(CONFIG, 1, 8), KVCache(CONFIG, 1, 8)
    with torch.inference_mode():
        logits = next_logits(model, torch.tensor([4]), cache)
        assert torch.equal(logits, model(torch.tensor([[4]]), cache=other)[:, 0])
    assert not step


class Affine8(nn.Module):
    """A projection in 8 bits, as data and as a module."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        weight = original.weight.detach()
        groups = weight.unflatten(1, (-1, 32))
        low, high = groups.amin(-1), groups.amax(-1)
        scales = (high - low).clamp(min=1e-8) / 255
        q = ((groups - low[..., None]) / scales[..., None]).round().to(torch.uint8).flatten(1)
        q = q.view(torch.int32).view(torch.uint32)
        self.affine = Affine(q, scales, low.clone(), 8, 32)

    def compressed(self) -> Affine:
        return self.affine

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.affine)


def quantized(model: OpenELM) -> OpenELM:
    for layer in model.layers:
        for owner, name in ((layer.attn, "qkv_proj"), (layer.ffn, "proj_1")):
            setattr(owner, name, Affine8(getattr(owner, name)))
    return model


def test_compressed_weights_are_taken_as_they_are():
    model = quantized(model_of("hf_tiny"))
    weights = decoder_weights_of(model)
    assert weights.layers[2].qkv_proj is model.layers[2].attn.qkv_proj.affine
    assert isinstance(weights.layers[0].proj_1, Affine) and isinstance(
        weights.layers[0].proj_2, Tensor
    )
    model.layers[0].ffn.proj_1.compressed = lambda: "text"
    model.layers[0].ffn.proj_1 = copy.copy(model.layers[0].ffn.proj_1)
    with pytest.raises(ValueError, match="layers.0.ffn.proj_1 gives str as compressed"):
        decoder_weights_of(model)


@pytest.mark.parametrize("prepare", [accelerate, quantized], ids=["accelerated", "quantized"])
def test_decoding_uses_the_op(step, prepare):
    model = model_of("hf_tiny")
    prepare(model)
    tokens = generate(model, [[1, 2, 3], [4]], 6)
    assert [call["positions"] for call in step] == [[3 + i, 1 + i] for i in range(5)]
    assert all(
        call["weights"] is decoder_weights_of(model) and call["backend"] is None for call in step
    )
    del step[:]
    with torch.inference_mode():
        by_model = [greedy_by_passes(model, ids, 6) for ids in ([1, 2, 3], [4])]
    assert [row.tokens for row in tokens] == by_model and not step


def greedy_by_passes(model: OpenELM, ids: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        ids = [*ids, model(torch.tensor([ids]))[0, -1].argmax().item()]
    return ids[-steps:]


def test_greedy_and_the_proof_use_it(step, hf_tiny):
    model = hf_tiny.model()
    accelerate(model)
    expected = hf_tiny.tensors["greedy_9_plus_24"]
    assert torch.equal(greedy(model, expected[:, :9], 24), expected[:, 9:])
    assert len(step) == 23
    del step[:]
    with torch.inference_mode():
        logits = model_parity._token_by_token(model, expected[:, :20])
    assert len(step) == model_parity.DECODED
    torch.testing.assert_close(logits, model(expected[:, :20])[:, -model_parity.DECODED - 1 :])


def test_the_backend_that_was_asked_for(step):
    model = model_of("hf_tiny")
    accelerate(model, backend="reference")
    generate(model, [[1]], 2)
    assert [call["backend"] for call in step] == ["reference"] * 2


def test_where_the_model_decodes_itself(step):
    """The reference model, autocast, more rows than the op takes, copies by torch.compile."""
    model = model_of("hf_tiny")
    expected = generate(model, [[1, 2]], 3)
    restored = model_of("hf_tiny")
    accelerate(restored)
    restore(restored)
    generate(restored, [[1, 2]], 3)
    fast = model_of("hf_tiny")
    accelerate(fast)
    generate(fast, [[1, 2]] * 9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        generate(fast, [[1, 2]], 3)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="eager")
    assert generate(compiled, [[1, 2]], 3) == expected
    assert not step
    generate(fast, [[1, 2]] * 8, 3)
    assert len(step) == 2


def test_more_rows_than_the_op_takes_go_through_the_model(step):
    model = model_of("hf_tiny")
    prompts = [[1, 2 + b] for b in range(9)]
    expected = generate(model, prompts, 3)
    accelerate(model)
    assert generate(model, prompts, 3) == expected
    assert not step
    assert generate(model, prompts[:8], 3) == expected[:8]
    assert step


def test_a_step_that_does_not_fit_loses_nothing(step):
    model = model_of("hf_tiny")
    accelerate(model)
    cache = KVCache(model.config, 1, 3)
    with torch.inference_mode():
        for token in (4, 5, 6):
            next_logits(model, torch.tensor([token]), cache)
        with pytest.raises(ValueError, match="holds 3 tokens .* 3 written, 1 more"):
            next_logits(model, torch.tensor([7]), cache)
        with pytest.raises(ValueError, match="cache: batch must be 2, got 1"):
            next_logits(model, torch.tensor([7, 8]), cache)
    assert cache.length == 3
    assert len(step) == 3
