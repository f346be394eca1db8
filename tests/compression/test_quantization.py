"""Quantized weights: MLX's own bits, and what a model does with modules that hold them."""

import copy
import pickle
import sys

import pytest
import torch
from helpers.checkpoints import GROUPED, assert_held, assert_same, same_bits
from helpers.golden import GLU_FREE, GOLDEN, assert_as_accurate
from safetensors.torch import load_file

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize, reference, restore
from elmkernels.openelm import greedy
from elmkernels.openelm.compressed import QuantizedEmbedding, QuantizedLinear, product
from elmkernels.weights import quantize_weight
from elmkernels.weights.formats import Affine

SCHEMES = [(bits, group_size) for bits in (8, 4) for group_size in (32, 64)]
UNTIED = OpenELMConfig.from_hf_dict(
    GLU_FREE.to_hf_dict() | {"share_input_output_layers": False, "ffn_dim_divisor": 32}
)
IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(4))


def dense_twin(model: OpenELM) -> OpenELM:
    """A plain model with the weights that a converted one's stand for."""
    twin = OpenELM(model.config, seed=9, dtype=model.norm.weight.dtype)
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if hasattr(module, "compressed"):
            weights[f"{name}.weight"] = reference.dense(module.compressed())
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_are_mlx_s(dtype, bits, group_size):
    """Rows of normal, constant, zero, one-signed, denormal and huge weights."""
    golden = load_file(GOLDEN / "mlx_affine.safetensors")
    got = quantize_weight(golden[f"{dtype}.w"], bits, group_size)
    for name, tensor in (("weight", got.q), ("scales", got.scales), ("biases", got.biases)):
        assert same_bits(tensor, golden[f"{dtype}.{bits}.{group_size}.{name}"]), name


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_those_of_the_mlx_that_is_here(dtype, bits, group_size):
    mx = pytest.importorskip("mlx.core")
    w = torch.randn(300, 640, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = mx.array(w.float().numpy()).astype(getattr(mx, str(dtype).removeprefix("torch.")))
    got = quantize_weight(w, bits, group_size)
    with mx.stream(mx.cpu):
        q, *others = mx.quantize(theirs, group_size=group_size, bits=bits)
        expected = [torch.tensor(t.astype(mx.float32).tolist()).to(dtype) for t in others]
        words = torch.tensor(q.tolist(), dtype=torch.int64)
    assert torch.equal(got.q.long(), words)
    assert same_bits(got.scales, expected[0]) and same_bits(got.biases, expected[1])


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_the_error_is_at_most_half_a_step(bits, group_size):
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(2))
    affine = quantize_weight(w, bits, group_size)
    error = (reference.dense(affine, torch.float64) - w).abs()
    step = affine.scales.abs().repeat_interleave(group_size, dim=1)
    # The scale is stretched to make the edge exact, so the other end may be clamped: one step.
    assert (error <= step * (1 + 1e-5)).all()
    assert (error <= step * (0.5 + 1e-5)).float().mean() > 0.9
    assert (error.unflatten(1, (-1, group_size)).amax(-1) > 0).all()


def test_rows_are_independent_of_the_chunk_they_are_in():
    w = torch.randn(1100, 1280, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole, part = quantize_weight(w), quantize_weight(w[1000:])
    assert same_bits(whole.q[1000:], part.q) and same_bits(whole.scales[1000:], part.scales)


@pytest.mark.parametrize(
    ("w", "scheme", "message"),
    [
        (torch.zeros(2, 64), (3, 64), "bits must be 8 or 4, got 3"),
        (torch.zeros(2, 64), (4, 128), "group_size must be 32 or 64, got 128"),
        (torch.zeros(2, 96), (4, 64), "k must be a multiple of group_size 64, got 96"),
        (torch.zeros(64), (4, 64), r"w must be \[n, k\] of float32.*got \[64\]"),
        (torch.zeros(2, 64, dtype=torch.float64), (4, 64), "got .* torch.float64"),
        (torch.full((2, 64), torch.inf), (4, 64), "finite"),
    ],
)
def test_wrong_weights_are_refused(w, scheme, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w, *scheme)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("config", [GROUPED, UNTIED], ids=["tied", "untied"])
def test_a_quantised_model_is_the_model_of_its_dense_weights(config, embeddings):
    model = OpenELM(config, seed=1)
    done = quantize(model, 8, 32, embeddings)
    matrices = 4 * config.num_transformer_layers
    matrices += (1 if config.share_input_output_layers else 2) if embeddings else 0
    assert done.matrices == matrices and done.left == []
    assert done.bytes_after < 0.4 * done.bytes_before
    assert isinstance(model.token_embeddings, QuantizedEmbedding) == embeddings
    assert isinstance(model.layers[0].ffn.proj_1, QuantizedLinear)
    twin = dense_twin(model)
    assert_held(model, twin, IDS)
    assert torch.equal(greedy(model, IDS, 5), greedy(twin, IDS, 5))


def test_a_product_in_blocks_of_rows_and_its_gradient(monkeypatch):
    module = sys.modules["elmkernels.ops.linear"]  # `ops.linear` itself is the function
    monkeypatch.setattr(module, "BLOCK_BYTES", 96 * 4 * 100)  # 100 rows
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(340, 96, generator=generator)
    affine = quantize_weight(w, 4, 32)
    x = torch.randn(3, 7, 96, generator=generator, requires_grad=True)
    dy = torch.randn(3, 7, 340, generator=generator)
    got = product(x, affine)
    expected = reference.linear(x, affine)
    torch.testing.assert_close(got, expected)
    (dx,) = torch.autograd.grad(got, x, dy)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    truth = dy.double() @ reference.dense(affine, torch.float64)
    assert_as_accurate(dx, expected_dx, truth, "dx")
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, affine).dtype == torch.bfloat16


def test_gradients_reach_the_norms_through_frozen_weights():
    model = OpenELM(GROUPED, seed=1)
    quantize(model, 8, 32)
    twin = dense_twin(model)
    for m in (model, twin):
        m(IDS).square().mean().backward()
    trained = dict(model.named_parameters())
    assert set(trained) == {n for n, p in twin.named_parameters() if p.dim() == 1}
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad)


def test_casting_moves_scales_and_leaves_the_words_alone():
    model = OpenELM(GROUPED, seed=1)
    quantize(model, 4, 32)
    words = model.token_embeddings.weight.clone()
    expected = model.token_embeddings.scales.bfloat16()
    model.to(torch.bfloat16)
    assert same_bits(model.token_embeddings.weight, words)
    assert same_bits(model.token_embeddings.scales, expected)
    assert model.token_embeddings.dtype == model.activation_dtype == torch.bfloat16
    assert model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_state_dicts(copied):
    model = OpenELM(GROUPED, seed=1)
    quantize(model, 4, 32)
    other = copied(model)
    assert_same(model, other)
    third = OpenELM(GROUPED, seed=2)
    quantize(third, 4, 32)
    assert not torch.equal(third(IDS), model(IDS))
    third.load_state_dict(model.state_dict())
    assert torch.equal(third(IDS), other(IDS))
    model.token_embeddings.scales.zero_()
    assert torch.equal(third(IDS), other(IDS))


def test_accelerated_before_or_after():
    before, after, plain = (OpenELM(GROUPED, seed=1) for _ in range(3))
    quantize(plain, 8, 32)
    accelerate(before, backend="reference")
    quantize(before, 8, 32)
    quantize(after, 8, 32)
    report = accelerate(after, backend="reference")
    assert report.left == [] and "projections" not in report.accelerated
    assert "kept 12 QuantizedLinear" in report.notes
    expected = plain(IDS)
    for model in (before, after):
        assert type(model.norm).__name__ == "FusedRMSNorm" and model.norm.backend == "reference"
        assert model.layers[0].ffn.proj_1.backend == "reference"
        torch.testing.assert_close(model(IDS), expected)
        restore(model)
        assert model.layers[0].ffn.proj_1.backend is None
        assert torch.equal(model(IDS), expected)
        assert not any(type(m) is torch.nn.Linear for m in model.modules())


def test_a_packed_model_is_quantised_from_its_exact_weights():
    model, other = (OpenELM(GROUPED, seed=1, dtype=torch.bfloat16) for _ in range(2))
    pack(model)
    for m in (model, other):
        quantize(m, 4, 32)
    assert_same(model, other)


def test_what_cannot_be_quantised_stays_as_it_was():
    model = OpenELM(GROUPED, seed=1)
    with pytest.raises(TypeError, match="Linear"):
        quantize(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="layers.0.attn.out_proj has 32 columns.*64; group_size 32 fits"
    ):
        quantize(model, 4, 64)
    with torch.no_grad():
        model.layers[-1].ffn.proj_2.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="layers.2.ffn.proj_2 must be finite"):
        quantize(model, 4, 32)
    accelerate(model, backend="reference")
    with pytest.raises(ValueError, match="finite"):
        quantize(model, 4, 32)
    restore(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_a_second_time():
    model = OpenELM(GROUPED, seed=1)
    quantize(model, 4, 32, embeddings=False)
    with pytest.raises(ValueError, match="to 4 bits in groups of 32; asked for 8 bits"):
        quantize(model, 8, 32)
    assert quantize(model, 4, 32).matrices == 1  # what was left: the embedding
    assert isinstance(model.token_embeddings.compressed(), Affine)
