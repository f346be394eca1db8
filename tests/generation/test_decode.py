"""Whole models decoding through `ops.decode_step`, in every form of their weights."""

import copy

import pytest
import torch
from helpers.checkpoints import CONFIG as SMALL
from helpers.golden import load_hf_tiny

from elmkernels import OpenELM, Plan, accelerate, generate, ops, pack, processors, quantize
from elmkernels.acceleration.decoder_weights import decoder_weights_of
from elmkernels.acceleration.routines import PREPACKED
from elmkernels.generation import groups
from elmkernels.openelm import KVCache, OpenELMConfig, greedy, next_logits
from elmkernels.testing.parity import compare, runnable

# Layer-wise shares in widths that groups of 64 divide.
CONFIG = OpenELMConfig.from_hf_dict(
    SMALL.to_hf_dict() | {"model_dim": 128, "head_dim": 32, "ffn_dim_divisor": 64}
    | {"num_query_heads": [2, 2, 4], "num_kv_heads": [1, 1, 2]}
)  # fmt: skip
BACKENDS = runnable("decode_step")
FORMS = {
    "float32": (torch.float32, lambda model: None),
    "bfloat16": (torch.bfloat16, lambda model: None),
    "packed12": (torch.bfloat16, lambda model: pack(model, progress=False)),
    "8 bits": (torch.bfloat16, lambda model: quantize(model, 8, 32, progress=False)),
    "4 bits": (torch.float32, lambda model: quantize(model, 4, 64, progress=False)),
}


def model_in(form: str) -> OpenELM:
    dtype, convert = FORMS[form]
    model = OpenELM(CONFIG, seed=2, dtype=dtype)
    convert(model)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_tokens(backend):
    golden = load_hf_tiny()
    model = golden.model()
    accelerate(model, backend=backend)
    expected = golden.tensors["greedy_9_plus_24"]
    assert torch.equal(greedy(model, expected[:, :9], 24), expected[:, 9:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_every_step(backend, form):
    """Ragged rows, each step's logits by the project's rule: truth is the plain model in a wider
    dtype with the very same weights."""
    model = model_in(form)
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)
    accelerate(model, backend=backend)
    ids = torch.randint(CONFIG.vocab_size, (3, 20), generator=torch.Generator().manual_seed(3))
    caches = [KVCache(m.config, 3, 32, dtype=m.activation_dtype) for m in (wide, plain, model)]
    collected: list[list[torch.Tensor]] = [[], [], []]
    with torch.inference_mode():
        for m, cache, logits in zip((wide, plain, model), caches, collected, strict=True):
            m(ids[:, :6], cache=cache, counts=[6, 2, 4])
            for i in range(6, 20):
                step = ids[:, i]
                if m is model:
                    logits.append(next_logits(m, step, cache))
                else:
                    logits.append(m(step[:, None], cache=cache)[:, -1])
    found = compare(*(torch.stack(logits) for logits in collected), what=f"logits, {form}")
    assert found.ok, found.reason


def test_a_quantised_model_generates_alike_swapped_or_not():
    model = model_in("4 bits")
    expected = generate(model, [[1, 2, 3], [4]], 12)
    accelerate(model)
    assert generate(model, [[1, 2, 3], [4]], 12) == expected


@pytest.mark.parametrize("steps", [1, 5])
def test_greedy_raises_for_nan(steps):
    model = model_in("float32")
    accelerate(model)
    with torch.no_grad():
        model.layers[1].attn.out_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits must be numbers to choose a token, got NaN"):
        greedy(model, torch.tensor([[1, 2, 3]]), steps)


@pytest.mark.parametrize("batch", [9, 16, 17])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["groups", "layers"])
def test_more_rows_than_a_step_takes(way, form, batch, monkeypatch):
    """By groups of rows or by the layers: ragged rows, by the project's rule."""
    monkeypatch.setattr(groups, "grouped", lambda model, weights, rows: way == "groups")
    model = model_in(form)
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)
    accelerate(model)
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(CONFIG.vocab_size, (batch, 12), generator=generator)
    counts = [1 + row % 6 for row in range(batch)]
    collected: list[list[torch.Tensor]] = [[], [], []]
    steps = []
    one = ops.decode_step
    monkeypatch.setattr(ops, "decode_step", lambda *a, **k: steps.append(len(a[1])) or one(*a, **k))
    with torch.inference_mode():
        for m, logits in zip((wide, plain, model), collected, strict=True):
            cache = KVCache(m.config, batch, 16, dtype=m.activation_dtype)
            m(ids[:, :6], cache=cache, counts=counts)
            for i in range(6, 12):
                step = ids[:, i]
                if m is model:
                    logits.append(next_logits(m, step, cache))
                else:
                    logits.append(m(step[:, None], cache=cache)[:, -1])
            assert cache.rows == [count + 6 for count in counts]
    of_step = [8, *([8] if batch >= 16 else []), batch % 8][: -(-batch // 8)]
    assert steps == (of_step * 6 if way == "groups" else [])
    found = compare(*(torch.stack(logits) for logits in collected), what=f"logits, {form}")
    assert found.ok, found.reason


def test_groups_follow_a_cache_that_changes_its_dtype():
    cache = KVCache(CONFIG, 11, 8)
    before = groups.arenas_of(cache)
    assert [a.batch for a in before] == [8, 3] and groups.arenas_of(cache) is before
    cache.take_dtype(torch.bfloat16)
    after = groups.arenas_of(cache)
    assert after is not before and all(a.data is cache.arena.data for a in after)
    for layer, heads in enumerate(cache.kv_heads):
        for arena, begin in zip(after, (0, 8), strict=True):
            k, v = arena.views(layer, heads)
            for own, whole in ((k, cache.k[layer]), (v, cache.v[layer])):
                assert own.data_ptr() == whole[begin:].data_ptr()
                assert own.shape == whole[begin : begin + arena.batch].shape
                assert own.stride() == whole.stride()


@pytest.mark.parametrize("bits", [0, 12, 8, 4])
def test_which_batches_go_in_groups(bits):
    """Up to the row of the table; of plain weights none that a prepacked copy multiplies."""
    form = {0: "bfloat16", 12: "packed12", 8: "8 bits", 4: "4 bits"}[bits]
    model = OpenELM(CONFIG, seed=2, dtype=torch.bfloat16)
    FORMS[form][1](model)
    accelerate(model, plan=Plan())
    weights = decoder_weights_of(model)
    most = processors.row(processors.GROUPED, bits, torch.bfloat16).choice
    assert 8 < most <= groups.MOST
    found = [groups.grouped(model, weights, batch) for batch in (1, 8, 9, most, most + 1)]
    assert found == [True, True, True, True, False]
    if not bits:
        accelerate(model, plan=Plan(several_rows=PREPACKED))
        assert [groups.grouped(model, weights, batch) for batch in (8, 9)] == [True, False]
