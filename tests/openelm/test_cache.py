"""The key/value cache: any split into passes, padding, rows of different lengths, failures, its
memory, and greedy decoding through it.
"""

import copy
import io
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import CONFIG
from helpers.golden import GLU_FREE, assert_as_accurate, assert_matches

from elmkernels.openelm import KVCache, OpenELM, OpenELMConfig, accelerate, greedy

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
    with pytest.raises(TypeError, match="dtype must be floating point, got torch.int64"):
        KVCache(GLU_FREE, 1, 8, dtype=torch.int64)
    assert KVCache(GLU_FREE, 1).max_length == GLU_FREE.rope_max_length


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_layer_has_its_own_share_of_one_arena(device):
    config = CONFIG
    assert len(set(config.num_kv_heads)) > 1
    cache = KVCache(config, 3, 10, dtype=torch.bfloat16, device=device)
    arena = cache.arena
    assert (arena.batch, arena.max_length, arena.head_dim) == (3, 10, config.head_dim)
    assert arena.offsets.dtype == torch.int64 and arena.offsets.device.type == "cpu"
    blocks = []
    for layer, heads in enumerate(config.num_kv_heads):
        size = 3 * heads * 10 * config.head_dim
        for mine, theirs in zip((cache.k, cache.v), arena.views(layer, heads), strict=True):
            assert mine[layer].shape == theirs.shape == (3, 10, heads, config.head_dim)
            assert mine[layer].stride() == theirs.stride()
            assert mine[layer].transpose(1, 2).is_contiguous()
            if device == "cpu":
                assert mine[layer].data_ptr() == theirs.data_ptr()
        blocks += [(start, start + size) for start in arena.offsets[layer].tolist()]
    assert all(a[1] <= b[0] < a[1] + 64 for a, b in zip(blocks, blocks[1:], strict=False))
    assert blocks[-1][1] <= arena.data.numel() < blocks[-1][1] + 64
    assert all(start % 64 == 0 for start, _ in blocks)
    uniform = 2 * len(config.num_kv_heads) * 3 * max(config.num_kv_heads) * 10 * config.head_dim
    assert cache.nbytes < 2 * uniform
    if device == "cpu":
        assert not arena.data.any()
        cache.v[1][2, 9, 1, 5] = 1
        assert arena.data.sum() == 1


def test_lengths_of_rows():
    cache = KVCache(GLU_FREE, 3, 8)
    assert not cache.ragged and cache.lengths.tolist() == [0, 0, 0]
    cache.advance(2)
    cache.advance([1, 0, 3])
    assert cache.ragged and cache.length == 5
    assert cache.lengths.dtype == torch.int64 and cache.lengths.tolist() == [3, 2, 5]
    cache.advance(torch.tensor([0, 1, 0]))
    cache.advance(1)
    assert cache.rows == [4, 4, 6]
    for wrong, message in (
        (3, "row 2 has 6 written, 3 more"),
        ([0, 5, 0], "row 1 has 4 written, 5 more"),
        ([0, 1], r"one for each of 3 rows, got \[0, 1\]"),
        ([0, 1, -1], r"got \[0, 1, -1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.advance(wrong)
        assert cache.rows == [4, 4, 6]
    cache.truncate(5)
    assert cache.rows == [4, 4, 5]
    with pytest.raises(ValueError, match=r"length of row 1 must lie in \[0, 4\], got 5"):
        cache.truncate([4, 5, 5])
    cache.truncate([1, 4, 0])
    assert cache.rows == [1, 4, 0] and repr(cache).startswith("KVCache(batch=3, max_length=8")
    cache.truncate(0)
    assert not cache.ragged and cache.length == 0
    cache.advance([2, 2, 2])
    assert not cache.ragged
    cache.reset()
    assert cache.rows == [0, 0, 0]


@pytest.mark.parametrize("accelerated", [False, True])
def test_refuses_wrong_counts(accelerated):
    model, cache = tiny_model(), KVCache(GLU_FREE, 2, 8)
    if accelerated:
        accelerate(model)
    mask = torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        for kwargs, message in (
            ({"counts": [1, 2]}, "counts must be given with a cache"),
            ({"counts": [1, 2], "cache": cache, "attention_mask": mask}, "without attention_mask"),
            ({"counts": [1], "cache": cache}, r"2 numbers in \[0, 5\], got \[1\]"),
            ({"counts": [1, 6], "cache": cache}, r"2 numbers in \[0, 5\], got \[1, 6\]"),
        ):
            with pytest.raises(ValueError, match=message):
                model(IDS, **kwargs)
        model(IDS, cache=cache, counts=[4, 1])
        with pytest.raises(ValueError, match="row 0 has 4 written, 5 more"):
            model(IDS, cache=cache, counts=[1, 1])  # padding needs room too
        with pytest.raises(ValueError, match=r"attention_mask must be None .*got \[4, 1\]"):
            model(IDS[:, :1], mask, cache)
        assert cache.rows == [4, 1]
        cache.reset()
        model(IDS, cache=cache, counts=[5, 5])
        assert not cache.ragged


def copies(cache: KVCache) -> list[KVCache]:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), loaded]


@pytest.mark.parametrize("counts", [None, [5, 2]])
def test_copies_go_on_alone(counts):
    model = tiny_model().eval()
    cache = KVCache(GLU_FREE, 2, 16)
    with torch.inference_mode():
        model(IDS, cache=cache, counts=counts)
        expected = model(IDS + 1, cache=copy.deepcopy(cache))
        for other in copies(cache):
            assert other.rows == cache.rows and other.arena.max_length == 16
            assert torch.equal(model(IDS + 1, cache=other), expected)
            assert other.arena.views(1, 2)[0].data_ptr() == other.k[1].data_ptr()
        assert cache.length == 5
        assert torch.equal(model(IDS + 1, cache=cache), expected)


def test_a_copy_holds_what_is_written_only():
    cache = KVCache(OpenELMConfig.from_name("OpenELM-270M"), 1)
    assert len(pickle.dumps(cache)) < 100_000 < cache.nbytes


def test_a_cache_made_in_inference_mode_works_outside():
    model = tiny_model()
    with torch.inference_mode():
        cache = KVCache(GLU_FREE, 2, 16)
        model(IDS, cache=cache)
    with torch.no_grad():
        model(IDS, cache=cache)
    assert cache.length == 10


def resident() -> int:
    """Bytes of this process that are in memory and belong to no file."""
    text = Path("/proc/self/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    sys.platform != "linux" or os.sysconf("SC_PAGE_SIZE") != 4096,
    reason="reads /proc, and expects small pages",
)
def test_memory_follows_the_tokens_not_max_length():
    config = OpenELMConfig.from_name("OpenELM-270M", rope_max_length=1 << 17)
    before = resident()
    cache = KVCache(config, 4, dtype=torch.bfloat16)
    assert cache.nbytes > 7 << 30
    assert resident() - before < 8 << 20
    token = 4 * 2 * sum(config.num_kv_heads) * config.head_dim * 2
    for tokens in (64, 256):
        for k, v in zip(cache.k, cache.v, strict=True):
            k[:, :tokens] = 1
            v[:, :tokens] = 1
        # 64 tokens of a head are 8192 bytes, up to three pages where they begin inside one.
        assert tokens * token <= resident() - before < 2 * tokens * token + (8 << 20)
    del cache, k, v
    assert resident() - before < 64 * token


def test_a_refused_reservation_is_a_memory_error():
    config = OpenELMConfig.from_name("OpenELM-270M", rope_max_length=1 << 30)
    with pytest.raises(MemoryError, match="can't be reserved"):
        KVCache(config, 1 << 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("accelerated", [False, True])
def test_compiled_ragged_passes(accelerated):
    model = tiny_model()
    if accelerated:
        accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    results = []
    for run in (model, compiled):
        cache = KVCache(GLU_FREE, 2, 16)
        with torch.inference_mode():
            first = run(IDS, cache=cache, counts=[5, 2], logits_to_keep=1)
            steps = [run(IDS[:, i : i + 1] + i, cache=cache) for i in range(3)]
        assert cache.rows == [8, 5]
        results.append(torch.cat((first, *steps), 1))
    torch.testing.assert_close(results[1], results[0])


def test_inductor_writes_the_cache_in_place():
    model = tiny_model()
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    cache, expected = KVCache(GLU_FREE, 2, 16), KVCache(GLU_FREE, 2, 16)
    with torch.inference_mode():
        for start in (0, 1, 2):
            ids = IDS[:, :1] + start
            torch.testing.assert_close(compiled(ids, cache=cache), model(ids, cache=expected))
    assert cache.length == 3
    torch.testing.assert_close(cache.arena.data, expected.arena.data)


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
