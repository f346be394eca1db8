"""`accelerate(activations="int8")`: every product of a quantized weight meets rounded rows, in a
prompt and in decoding, and what can't be rounded is refused before anything is changed.
"""

import copy
import pickle

import pytest
import torch
from helpers import reports
from helpers.checkpoints import GROUPED, same_bits
from torch import nn

from elmkernels import (
    OpenELM,
    OpenELMConfig,
    accelerate,
    generate,
    pack,
    quantize,
    reference,
    restore,
)
from elmkernels.acceleration.decoder_weights import decoder_weights_of
from elmkernels.bench.runners import ROUNDED, compress, rounded_runner
from elmkernels.compression.plain import make_plain
from elmkernels.openelm import KVCache, next_logits
from elmkernels.openelm.compressed import Quantized
from elmkernels.surgery import is_accelerated, mark_of
from elmkernels.testing.rounding import rounding_loss

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(4))
UNTIED = OpenELMConfig.from_hf_dict(GROUPED.to_hf_dict() | {"share_input_output_layers": False})


def quantized(bits: int = 8, config: OpenELMConfig = GROUPED, **options) -> OpenELM:
    model = OpenELM(config, seed=3)
    quantize(model, bits, 32, progress=False, **options)
    return model.eval()


class Rounding(nn.Module):
    """A projection by a quantized weight, of rows that the specification rounds."""

    def __init__(self, module: Quantized) -> None:
        super().__init__()
        self.weight = reference.dense(module.compressed())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.int8_rows(x) @ self.weight.t()


def specification(model: OpenELM) -> OpenELM:
    """The model with every product of a quantized projection by the specification."""
    made = copy.deepcopy(model)
    if is_accelerated(made):
        restore(made)
    for name, module in list(made.named_modules()):
        if isinstance(module, Quantized) and name != "token_embeddings":
            owner, _, last = name.rpartition(".")
            made.get_submodule(owner)._modules[last] = Rounding(module)
    return made


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("config", [GROUPED, UNTIED], ids=["tied", "untied"])
def test_every_product_is_the_specification_s(bits, config):
    """Those of a tied head too, whose weight is the embedding's; in a prompt and step by step."""
    model = quantized(bits, config, embeddings=False)
    plain, expected = copy.deepcopy(model), specification(model)
    report = accelerate(model, activations="int8")
    assert any("rounded to 8 bits" in note for note in report.notes)
    with torch.inference_mode():
        truth, without = expected(IDS), plain(IDS)
        cache = KVCache(model.config, 2, 16)
        steps = [model(IDS[:, :4], cache=cache)]
        steps += [next_logits(model, IDS[:, i], cache)[:, None] for i in range(4, 9)]
        found = {"a prompt": model(IDS), "steps": torch.cat(steps, 1)}
    shown = (without - truth).norm()
    assert shown > 1e-3 * truth.norm()
    for what, got in found.items():
        # A number at the edge between two may be rounded to the other: rarely.
        assert (got - truth).norm() < 0.3 * shown, what


def test_a_tied_head_of_a_quantized_embedding_is_rounded():
    model = quantized(embeddings=True)
    accelerate(model, activations="int8")
    x = torch.randn(3, 64)
    weight = model.token_embeddings.compressed()
    with torch.inference_mode():
        expected = reference.int8_rows(x) @ reference.dense(weight).t()
        torch.testing.assert_close(model.project(x), expected, rtol=1e-4, atol=1e-4)


def test_it_is_told_and_undone():
    model = quantized()
    accelerate(model, activations="int8")
    found = [m for m in model.modules() if isinstance(m, Quantized)]
    matrices = [m for m in found if m is not model.token_embeddings]  # which is looked up
    assert {m.activations for m in matrices} == {"int8"}
    assert decoder_weights_of(model).activations == "int8"
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            assert same_bits(copied(IDS), model(IDS))
        assert decoder_weights_of(copied).activations == "int8"
    accelerate(model)
    assert {m.activations for m in matrices} == {None}
    assert decoder_weights_of(model).activations is None
    accelerate(model, activations="int8")
    restore(model)
    assert {m.activations for m in matrices} == {None}
    with torch.inference_mode():
        assert same_bits(model(IDS), quantized()(IDS))


def test_a_conversion_that_leaves_no_quantized_weight_leaves_nothing_to_round():
    model = quantized(4)
    accelerate(model, activations="int8")
    make_plain(model, progress=False)
    assert is_accelerated(model) and mark_of(model).arguments["activations"] is None
    quantize(model, 8, 32, progress=False)
    assert not any(m.activations for m in model.modules() if isinstance(m, Quantized))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda m: None, "int8", "None unless weights are quantized to 8 or 4 bits"),
        (lambda m: pack(m.bfloat16(), progress=False), "int8", "None unless weights are quantized"),
        (lambda m: quantize(m, 8, 32, progress=False), "int4", "'int8' or None, got 'int4'"),
        (lambda m: quantize(m, 8, 32, progress=False), 8, "'int8' or None, got 8"),
    ],
    ids=["plain", "packed12", "another word", "a number"],
)
def test_what_it_needs_is_said(make, given, message, accelerated):
    model = OpenELM(GROUPED, seed=3)
    make(model)
    if accelerated:
        accelerate(model)
    with pytest.raises(ValueError, match=f"activations must be {message}"):
        accelerate(model, activations=given)
    assert is_accelerated(model) == accelerated
    assert not any(m.activations for m in model.modules() if isinstance(m, Quantized))


def test_a_gradient_through_it_is_refused():
    model = quantized()
    accelerate(model, activations="int8")
    x = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="linear"):
        model.layers[0].ffn(x)


@pytest.mark.parametrize("format", ROUNDED)
def test_what_it_loses_is_measured(format):
    """By the error of the logits and the perplexity of a text, beside those without."""
    model = reports.load(torch.bfloat16).eval()
    runner = rounded_runner(format, model, 24, None)
    found = runner.facts["rounding"]
    assert runner.name == f"ours {format}, int8 activations"
    assert 1e-4 < found["logits_rms"] < 0.1 and found["logits_max"] > found["logits_rms"]
    assert abs(found["perplexity"] / found["perplexity_without"] - 1) < 0.1
    ours = compress(format, model, progress=False)
    accelerate(ours)
    nothing = rounding_loss(ours, 24)
    assert nothing["logits_rms"] == nothing["logits_max"] == 0
    assert nothing["perplexity"] == nothing["perplexity_without"]
    assert generate(ours, [[1]], 3) != [] and mark_of(ours).arguments["activations"] is None
