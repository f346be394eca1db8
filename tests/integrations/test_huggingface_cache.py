"""The cache of transformers' interface: turns, crops, orders of rows, padding, other classes."""

import copy

import pytest
import torch
from helpers.transformers_models import ids, left_padded, wrapped

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from elmkernels import hf


@pytest.fixture(scope="module")
def ours():
    return wrapped("auto")


def test_a_chat_goes_on_with_the_cache_it_got(ours):
    first = ours.generate(
        ids(1, 9), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    cache = first["cache"]
    assert isinstance(cache, hf.OpenELMCache) and cache.get_seq_length() == 13
    turn = torch.cat((first.sequences, ids(1, 4, seed=3)), dim=1)
    name = {"cache": cache}
    got = ours.generate(turn, max_new_tokens=5, do_sample=False, **name)
    assert got.tolist() == ours.generate(turn, max_new_tokens=5, do_sample=False).tolist()
    other = DynamicCache(config=ours.config)
    ours.generate(first.sequences, max_new_tokens=1, do_sample=False, cache=other)
    assert ours.generate(turn, max_new_tokens=5, do_sample=False, cache=other).tolist() == (
        got.tolist()
    )


@pytest.mark.parametrize("make", [
    lambda config: DynamicCache(), lambda config: DynamicCache(config=config),
    lambda config: StaticCache(config=config, max_cache_len=40), hf.OpenELMCache,
])  # fmt: skip
@pytest.mark.parametrize("implementation", ["elmkernels", "sdpa", "eager"])
def test_any_cache_with_any_attention(make, implementation):
    model = wrapped("auto")
    model.set_attn_implementation(implementation)
    tokens = ids(2, 12)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache, parts, at = make(model.config), [], 0
        for n in (5, 1, 4, 1, 1):
            parts.append(model(tokens[:, at : at + n], cache=cache, use_cache=True).logits)
            at += n
            assert int(cache.get_seq_length()) == at
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_the_older_name_of_the_cache(ours):
    cache = hf.OpenELMCache(ours.config)
    with torch.no_grad():
        out = ours(ids(1, 5), past_key_values=cache)
        assert out.past_key_values is cache
        step_by_step = ours(ids(1, 1), past_key_values=cache).logits
    assert step_by_step.shape == (1, 1, 320) and cache.get_seq_length() == 6


def test_the_cache_is_a_cache(ours):
    tokens = ids(3, 8)
    with torch.no_grad():
        cache = ours(tokens).cache
        assert len(cache) == 3 and cache.batch_size == 3 and cache.is_croppable
        shapes = [tuple(layer.keys.shape) for layer in cache.layers]
        assert shapes == [(3, heads, 8, 32) for heads in ours.config.num_kv_heads]
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        again = ours(tokens[:, 5:], cache=cache).logits
        torch.testing.assert_close(again, ours(tokens).logits[:, 5:], rtol=1e-4, atol=1e-4)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        turned = ours(tokens[[2, 0, 0], -1:], cache=cache).logits
        fresh = torch.cat((tokens, tokens[:, -1:]), 1)[[2, 0, 0]]
        torch.testing.assert_close(turned, ours(fresh).logits[:, -1:], rtol=1e-4, atol=1e-4)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 2 and cache.get_seq_length() == 9
        other = copy.deepcopy(cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and other.get_seq_length() == 9
        assert other.layers[0].owner is other


def test_a_padded_cache_is_cropped_and_reordered(ours):
    prompt, mask = left_padded([3, 8])
    longer = torch.cat((mask, torch.ones(2, 2).long()), 1)
    rest = ids(2, 2, seed=4)
    with torch.no_grad():
        cache = ours(prompt, attention_mask=mask).cache
        assert cache.kv.rows == [3, 8]
        expected = ours(rest, attention_mask=longer, cache=cache).logits
        cache.crop(-2)
        assert cache.kv.rows == [3, 8] and cache.get_seq_length() == 8
        torch.testing.assert_close(
            ours(rest, attention_mask=longer, cache=cache).logits, expected, rtol=1e-5, atol=1e-5
        )
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = ours(rest.flip(0), attention_mask=longer.flip(0), cache=cache).logits
        torch.testing.assert_close(got.flip(0), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_that_forgets_what_the_cache_holds_is_refused(ours):
    prompt, mask = left_padded([3, 8])
    with torch.no_grad():
        cache = ours(prompt, attention_mask=mask).cache
        with pytest.raises(ValueError, match="must say of the 8 tokens in the cache"):
            ours(ids(2, 1), attention_mask=torch.ones(2, 9), cache=cache)
        with pytest.raises(ValueError, match=r"attention_mask must be \[2, 9\] \(past \+ new"):
            ours(ids(2, 1), attention_mask=torch.ones(2, 1), cache=cache)
        assert cache.get_seq_length() == 8


def test_more_tokens_than_there_are_positions(ours):
    with pytest.raises(ValueError, match=r"has 256 positions \(rope_max_length\)"):
        ours(ids(1, 257))
    with torch.no_grad():
        cache = ours(ids(1, 250)).cache
        with pytest.raises(ValueError, match="got 250 past"):
            ours(ids(1, 7), cache=cache)
    assert cache.get_seq_length() == 250


def test_gradients_do_not_go_through_the_cache(ours):
    with pytest.raises(RuntimeError, match="holds no gradients"):
        ours(ids(1, 3), cache=hf.OpenELMCache(ours.config))
    cache = ours(ids(1, 3)).cache
    assert isinstance(cache, DynamicCache) and cache.layers[0].keys.requires_grad
