"""Generation wherever the model computes: the cache has the dtype of the keys that it is given."""

import pytest
import torch
from helpers.checkpoints import CONFIG
from torch import nn

from elmkernels import OpenELM, accelerate, generate
from elmkernels.openelm import KVCache, Session, greedy
from elmkernels.openelm.layers import RMSNorm

PROMPTS = [[1, 2, 3], [4]]
IDS = torch.tensor([[1, 2, 3]])


def mixed(weights: torch.dtype, norms: torch.dtype) -> OpenELM:
    """A model whose norms have a dtype of their own, as tools for training make them."""
    model = OpenELM(CONFIG, seed=1, dtype=weights).eval()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.to(norms)
    return model


def without_cache(model: nn.Module, prompt: list[int], steps: int) -> list[int]:
    """What a model chooses that reads everything again for each token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def assert_generates(model: nn.Module, exact: bool = True) -> None:
    rows = generate(model, PROMPTS, 5, stop_tokens=())
    assert all(len(row.tokens) == 5 for row in rows)
    if exact:
        assert [row.tokens for row in rows] == [without_cache(model, p, 5) for p in PROMPTS]
    assert greedy(model, IDS, 5).tolist() == [rows[0].tokens]


LOW, HIGH = (torch.bfloat16, torch.float16), torch.float32


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
@pytest.mark.parametrize(
    ("weights", "norms"), [(low, HIGH) for low in LOW] + [(HIGH, low) for low in LOW], ids=str
)
def test_norms_of_another_dtype(weights, norms, accelerated):
    model = mixed(weights, norms)
    with torch.inference_mode():
        expected = model(IDS)
    if accelerated:
        accelerate(model)
    assert model.activation_dtype == weights
    model.loss(IDS, IDS).backward()
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS), expected, rtol=0.05, atol=0.05)
    assert_generates(model, exact=weights == HIGH)


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", LOW, ids=str)
def test_autocast(weights, autocast, accelerated):
    """Of any dtype over any other; the session may be made outside of it."""
    model = OpenELM(CONFIG, seed=1, dtype=weights).eval()
    if accelerated:
        accelerate(model)
    session = Session(model, 2)
    with torch.autocast("cpu", autocast):
        rows = session.generate(PROMPTS, 5, stop_tokens=())
        assert session.cache.dtype == autocast
        assert [len(row.tokens) for row in rows] == [5, 5]
        assert len(greedy(model, IDS, 4)[0]) == 4
    # What was kept is of no use outside: it is read again.
    run = session.stream(PROMPTS, 5, stop_tokens=())
    assert run.reused == [0, 0] or weights == autocast
    assert [row.tokens for row in session.generate(PROMPTS, 5, stop_tokens=())] == [
        row.tokens for row in generate(model, PROMPTS, 5, stop_tokens=())
    ]
    assert session.cache.dtype == weights


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
def test_a_forward_that_is_wrapped_in_autocast(accelerated):
    """As tools for mixed precision do it: outside of the forward nothing tells."""
    model = OpenELM(CONFIG, seed=1).eval()
    if accelerated:
        accelerate(model)
    inner = model.forward

    def wrapped(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(*args, **kwargs).float()

    model.forward = wrapped
    session = Session(model)
    for prompt, reused in (([1, 2, 3], 0), ([1, 2, 3, 4], 3), ([7], 0)):
        run = session.stream([prompt], 4, stop_tokens=())
        assert run.reused == [reused] and len(list(run)) == 4
    assert session.cache.dtype == torch.bfloat16
    assert_generates(model, exact=False)


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
def test_a_model_that_a_tool_for_mixed_precision_prepared(accelerated):
    tool = pytest.importorskip("accelerate")
    model = OpenELM(CONFIG, seed=1).eval()
    if accelerated:
        accelerate(model)
    prepared = tool.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert_generates(prepared, exact=False)


def test_a_cache_of_a_given_dtype_keeps_it():
    model = OpenELM(CONFIG, seed=1, dtype=torch.bfloat16)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="dtype must be torch.bfloat16, got torch.float32"):
            model(IDS, cache=KVCache(CONFIG, 1, 8, dtype=torch.float32))
        cache = KVCache(CONFIG, 1, 8)
        assert cache.dtype == torch.float32
        model(IDS, cache=cache)
        assert cache.dtype == torch.bfloat16 and cache.length == 3
        with pytest.raises(ValueError, match="dtype must be torch.float32, got torch.bfloat16"):
            model.float()(IDS[:, :1], cache=cache)


def test_a_cache_whose_memory_does_not_suffice_stays_as_it_was(monkeypatch):
    cache, allocate = KVCache(CONFIG, 1, 8), KVCache._allocate

    def short(self, dtype, device):
        if dtype == torch.float64:
            raise MemoryError("no room")
        allocate(self, dtype, device)

    monkeypatch.setattr(KVCache, "_allocate", short)
    with pytest.raises(MemoryError, match="no room"):
        cache.take_dtype(torch.float64)
    assert cache.dtype == cache.arena.data.dtype == torch.float32


def test_layers_of_several_dtypes_are_refused():
    """A cache is of one dtype, and what the first layer wrote stays."""
    cache = KVCache(CONFIG, 1, 8)
    shapes = [(1, 2, heads, CONFIG.head_dim) for heads in CONFIG.num_kv_heads]
    first = torch.randn(shapes[0]).bfloat16()
    k, _ = cache.append(0, first, first)
    assert torch.equal(k, first)
    wide = torch.randn(shapes[1])
    with pytest.raises(ValueError, match="k of layer 1 must be .* torch.bfloat16, got .*float32"):
        cache.append(1, wide, wide)
    assert torch.equal(cache.filled(0, 2)[0], first)


@pytest.mark.parametrize("part", ["layers.1.attn.qkv_proj", "norm", "token_embeddings", ""])
def test_what_no_kernel_computes_in_is_refused_by_accelerate(part):
    model = OpenELM(CONFIG, seed=1)
    model.get_submodule(part).double()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="is torch.float64, the kernels take torch.float32"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    if not part:
        assert_generates(model)
