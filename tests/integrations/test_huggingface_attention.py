"""Attention by any of transformers' implementations, masks and positions of any form, documents."""

import pytest
import torch
from helpers.transformers_models import eager, ids, left_padded, wrapped

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def ours():
    return wrapped("auto")


@pytest.fixture(scope="module")
def theirs():
    return eager()


def test_attention_weights_by_eager_alone(ours, theirs):
    weights = theirs(ids(1, 5), output_attentions=True).attentions
    assert [w.shape[1] for w in weights] == list(theirs.config.num_query_heads)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones_like(weights[0].sum(-1)))
    with pytest.raises(ValueError, match="attn_implementation must be 'eager'"):
        ours(ids(1, 5), output_attentions=True)


@pytest.mark.parametrize("holes", [False, True])
def test_masks_of_any_form_are_exact(holes, ours, theirs):
    """Padding on the left, on the right, and between."""
    tokens = ids(3, 10)
    mask = torch.ones(3, 10).long()
    mask[0, :4] = mask[1, 7:] = 0
    if holes:
        mask[2, 3:5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        without = ours(tokens, attention_mask=mask, use_cache=False).logits
        held = ours(tokens, attention_mask=mask, use_cache=True)
        real = mask.bool()
        for got in (without, held.logits):
            torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


def test_dense_masks_and_positions_of_ones_own(ours, theirs):
    tokens = ids(2, 6)
    dense = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone()
    dense[:, :, 4:, 1] = False
    positions = torch.arange(6).expand(2, -1) + 7
    additive = torch.where(dense, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        a = ours(tokens, attention_mask=dense, position_ids=positions).logits
        b = theirs(tokens, attention_mask=additive, position_ids=positions).logits
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for cached in (False, True):
            c = ours(tokens, position_ids=positions, use_cache=cached).logits
            d = theirs(tokens, position_ids=positions, use_cache=cached).logits
            torch.testing.assert_close(c, d, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_documents_in_a_row_do_not_see_each_other(implementation, ours):
    tokens = ids(2, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [*range(12)]])
    other = wrapped("auto")
    other.set_attn_implementation(implementation)
    with torch.no_grad():
        got = ours(tokens, position_ids=positions, use_cache=False).logits
        assert torch.equal(got[:1, 5:8], ours(tokens[:1, 5:8], use_cache=False).logits) or (
            (got[:1, 5:8] - ours(tokens[:1, 5:8], use_cache=False).logits).abs().max() < 1e-4
        )
        theirs = other(tokens[:1], position_ids=positions[:1], use_cache=False).logits
    torch.testing.assert_close(got[:1], theirs, rtol=1e-4, atol=1e-4)


COMPILED = pytest.param("flex_attention", marks=pytest.mark.ecosystem)


@pytest.mark.parametrize("implementation", ["elmkernels", "sdpa", "eager", COMPILED])
@pytest.mark.parametrize("kernels", ["auto", None])
def test_implementations_agree(implementation, kernels):
    model = wrapped(kernels)
    model.set_attn_implementation(implementation)
    prompt, mask = left_padded([3, 9])
    with torch.no_grad():
        got = model(prompt, attention_mask=mask, use_cache=False).logits
        expected = eager()(prompt, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_the_implementation_serves_other_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt, mask = left_padded([3, 9])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "num_beams": 2}):
        found = []
        for name in ("sdpa", "elmkernels"):
            model.set_attn_implementation(name)
            found.append(model.generate(prompt, **given, **options).tolist())
        assert found[0] == found[1]
