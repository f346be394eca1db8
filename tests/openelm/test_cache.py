"""The key/value cache: any split into passes, padding, failures, and greedy decoding through it."""

import pytest
import torch
from golden import GLU_FREE, assert_as_accurate, assert_matches

from elmkernels.openelm import KVCache, OpenELM, OpenELMConfig, greedy

IDS = torch.zeros(2, 5, dtype=torch.int64)


def cache_for(model: OpenELM, batch: int, max_length: int, **kwargs) -> KVCache:
    return KVCache(model.config, batch, max_length, **kwargs)


def tiny_model() -> OpenELM:
    return OpenELM(GLU_FREE, seed=0)


def test_cached_decoding(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    cache = cache_for(model, *ids.shape)
    prefix = tiny.decode_prefix
    with torch.inference_mode():
        logits = [model(ids[:, :prefix], cache=cache)]
        logits += [model(ids[:, i : i + 1], cache=cache) for i in range(prefix, ids.shape[1])]
    assert cache.length == ids.shape[1]
    assert_matches(torch.cat(logits, 1), tiny.tensors["decode_logits"], tiny.exact["logits"])
    for layer, v in enumerate(cache.v):
        expected = tiny.tensors[f"cache_v.{layer}"].transpose(1, 2)
        assert_as_accurate(v.bfloat16(), expected.bfloat16(), expected, f"cache_v.{layer}")


def test_cache_in_chunks_and_truncated(tiny):
    """Any split into passes, and going back, gives the logits of one pass."""
    model, ids = tiny.model(torch.float64), tiny.tensors["input_ids"]
    batch, length = ids.shape
    cache = cache_for(model, batch, length, dtype=torch.float64)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 20))]
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, :20])
        cache.truncate(8)
        torch.testing.assert_close(model(ids[:, 8:], cache=cache), whole[:, 8:])
        cache.reset()
        torch.testing.assert_close(model(ids[:, :4], cache=cache), whole[:, :4])


def test_context_of_a_padded_and_cached_pass(hf_tiny):
    model, seen = hf_tiny.model(), []
    layer = model.layers[0]
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = cache_for(model, 2, 8)
    ids = torch.ones(2, 4, dtype=torch.int64)
    with torch.inference_mode():
        model(ids, mask, cache)
        model(ids[:, :2], torch.cat((mask, torch.ones(2, 2, dtype=torch.int64)), 1), cache)
    first, second = seen
    assert first.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert second.positions.tolist() == [[2, 3], [4, 5]]
    assert first.slots.tolist() == [[0, 1, 2, 3]] * 2 and second.slots.tolist() == [[4, 5]] * 2
    assert second.key_mask.tolist() == [[False, False, True, True, True, True], [True] * 6]
    assert second.key_mask.dtype == torch.bool and second.slots.dtype == torch.int64


def test_refuses_caches():
    model = tiny_model()
    cases = [
        (cache_for(model, 3, 8), "cache: batch must be 2, got 3"),
        (cache_for(model, 2, 4), "holds 4 tokens .* 0 written, 5 more"),
        (
            cache_for(model, 2, 8, dtype=torch.bfloat16),
            "cache: dtype must be torch.float32, got torch.bfloat16",
        ),
        (
            KVCache(OpenELMConfig(num_transformer_layers=3, model_dim=64, head_dim=16), 2, 8),
            r"cache: key/value heads of each layer must be \[2, 2\], got \[4, 4, 4\]",
        ),
    ]
    for cache, message in cases:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(IDS, cache=cache)
        assert cache.length == 0
    with pytest.raises(RuntimeError, match="a cache holds no gradients"):
        model(IDS, cache=cache_for(model, 2, 8))


def test_cache_errors_and_size():
    cache = KVCache(GLU_FREE, 2, 8, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 2 * (2 * 8 * 2 * 16) * 2
    k = torch.ones(2, 3, 2, 16, dtype=torch.bfloat16)
    keys, values = cache.append(1, k, 2 * k)
    assert keys.data_ptr() == cache.k[1].data_ptr() and keys.shape == k.shape
    assert torch.equal(values, 2 * k) and cache.length == 0
    cache.advance(3)
    with pytest.raises(ValueError, match="holds 8 tokens .* 3 written, 6 more"):
        cache.advance(6)
    with pytest.raises(ValueError, match=r"k of layer 0 must be \[2, 3, 2, 16\].*torch.float32"):
        cache.append(0, k.float(), k)
    with pytest.raises(ValueError, match=r"v of layer 0 must be .*got \[2, 3, 1, 16\]"):
        cache.append(0, k, k[:, :, :1])
    with pytest.raises(ValueError, match=r"length must lie in \[0, 3\], got 4"):
        cache.truncate(4)
    with pytest.raises(ValueError, match="max_length must be at most rope_max_length 64, got 65"):
        KVCache(GLU_FREE, 1, 65)
    with pytest.raises(ValueError, match="batch and max_length must be positive, got 0 and 8"):
        KVCache(GLU_FREE, 0, 8)


def test_a_failed_pass_leaves_the_cache_as_it_was(tiny):
    model, ids = tiny.model(), tiny.tensors["input_ids"]
    cache = cache_for(model, *ids.shape)
    with torch.inference_mode():
        expected = model(ids, cache=cache_for(model, *ids.shape))
        model(ids[:, :4], cache=cache)

        def fail(*_):
            raise KeyError("interrupted")

        handle = model.layers[-1].register_forward_hook(fail)
        with pytest.raises(KeyError, match="interrupted"):
            model(ids[:, 4:], cache=cache)
        handle.remove()
        assert cache.length == 4
        torch.testing.assert_close(model(ids[:, 4:], cache=cache), expected[:, 4:])


def test_greedy_arguments():
    model = tiny_model()
    assert greedy(model, IDS, 0).shape == (2, 0)
    assert greedy(model, IDS.int(), 3).dtype == torch.int64
    with pytest.raises(ValueError, match="holds 6 tokens"):
        greedy(model, IDS, 4, max_length=6)
    with pytest.raises(ValueError, match=r"length > 0, got \[2, 0\]"):
        greedy(model, IDS[:, :0], 4)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        greedy(model, IDS, -1)


def test_a_cached_pass_on_meta_gives_shapes():
    model = OpenELM(GLU_FREE, device="meta", dtype=torch.bfloat16)
    cache = KVCache(GLU_FREE, 2, 8, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        assert model(IDS.to("meta"), cache=cache).shape == (2, 5, 96)
    assert cache.length == 5
