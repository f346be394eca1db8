"""What somebody changes in a model that is accelerated, beside hooks: methods of its classes and of
its modules, how weights lie in memory, eps and dtypes of norms. Numbers stay those of the model.
"""

import pytest
import torch
from acceleration.test_shortcuts import IDS, TARGETS, assert_same, close, model_of
from helpers.foreign import corenet, hugging_face
from torch import Tensor, nn

from elmkernels import OpenELM, accelerate, rope_table
from elmkernels.openelm import layers
from elmkernels.openelm.loss import LossHead


def scaled(function):
    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        return out * 1.5 if isinstance(out, Tensor) else (out[0] * 1.5, *out[1:])

    return call


CLASSES = [
    (layers.RMSNorm, "forward"), (nn.Linear, "forward"), (nn.Embedding, "forward"),
    (layers.DecoderLayer, "forward"), (layers.Attention, "forward"),
    (layers.Attention, "attended"), (layers.Attention, "normalized"),
    (layers.FeedForward, "forward"), (layers.TiedHead, "forward"), (layers.LogitsHead, "forward"),
    (LossHead, "forward"), (OpenELM, "forward"), (OpenELM, "project"), (OpenELM, "logits"),
]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: f"{kind[0].__name__}.{kind[1]}")
def test_a_method_that_was_replaced_in_its_class(monkeypatch, kind, when):
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
        assert_same(fast, eager)
    monkeypatch.setattr(*kind, scaled(getattr(*kind)))
    if when == "before":
        try:
            accelerate(fast)
        except ValueError as error:
            assert "is not an OpenELM this can swap" in str(error)
    assert_same(fast, eager)
    monkeypatch.undo()
    assert_same(fast, eager)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "place", ["layers.1.attn.attended", "layers.1.attn.normalized", "project", "logits", "_hidden"]
)
def test_a_method_of_a_module_s_own(place, when):
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
        assert_same(fast, eager)
    path, _, name = place.rpartition(".")
    for model in (eager, fast):
        module = model.get_submodule(path)
        setattr(module, name, scaled(getattr(module, name)))
    if when == "before":
        left = dict(accelerate(fast).left)
        if path:
            assert f"it has a method {name} of its own" in left[path]
    assert_same(fast, eager)


@pytest.mark.parametrize("name", ["RMSNorm", "Linear"])
@pytest.mark.parametrize("make", [corenet, hugging_face])
def test_a_method_that_was_replaced_in_a_foreign_class(monkeypatch, make, name):
    eager, fast = make(), make()
    accelerate(fast)
    body = getattr(eager, "transformer", eager)
    kind = type(body.layers[0].attn_norm) if name == "RMSNorm" else nn.Linear
    monkeypatch.setattr(kind, "forward", scaled(kind.forward))
    with torch.inference_mode():
        close(fast(IDS), eager(IDS), name)


def transposed(model):
    attn = model.layers[1].attn
    weight = next(m.weight for m in (attn.qkv_proj, attn.out_proj) if m.weight.dim() == 2)
    weight.data = weight.data.t().contiguous().t()


def turned(model):
    """A square matrix at the same address, its rows now its columns."""
    weight = next(p for p in model.parameters() if p.dim() == 2 and p.shape[0] == p.shape[1])
    weight.data = weight.data.t()


def narrowed(model):
    """Fewer neurons; proj_2 at the same address."""
    ffn = model.layers[1].ffn
    half, width = ffn.proj_2.weight.shape[1] // 2, ffn.proj_1.weight.shape[0] // 2
    ffn.proj_2.weight.data = ffn.proj_2.weight.data[:, :half]
    one = ffn.proj_1.weight.data
    ffn.proj_1.weight.data = torch.cat((one[:half], one[width : width + half]))


def strided_norm(model):
    weight = model.layers[0].ffn_norm.weight
    weight.data = torch.stack((weight.data * 1.5, weight.data), 1)[:, 0]


def written_past_torch(model):
    for weight in model.parameters():
        weight.detach().numpy()[...] *= 1.5


@pytest.mark.parametrize("change", [transposed, turned, narrowed, strided_norm, written_past_torch])
def test_weights_that_lie_otherwise(change):
    eager, fast = model_of(), model_of()
    accelerate(fast)
    assert_same(fast, eager)
    for model in (eager, fast):
        change(model)
    assert_same(fast, eager)


@pytest.mark.parametrize(
    "place", ["norm", "layers.1.ffn_norm", "layers.1.attn_norm", "layers.1.attn.q_norm",
              "layers.1.attn"],
)  # fmt: skip
def test_another_eps(place):
    eager, fast = model_of(), model_of()
    accelerate(fast)
    assert_same(fast, eager)
    for model in (eager, fast):
        model.get_submodule(place).eps = 0.5
    assert_same(fast, eager)


def swapped(model):
    first, second = model.layers[0], model.layers[1]
    model.layers[0], model.layers[1] = second, first


def without_the_first(model):
    del model.layers[0]


def without_the_last(model):
    del model.layers[-1]


def twice(model):
    model.layers.append(model.layers[0])


def other_positions(model):
    model.rope_table = rope_table(*model.rope_table.shape, 500.0)


def norms_of_embeddings(model):
    model.token_embeddings.max_norm = 0.5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [swapped, without_the_first, without_the_last, twice, other_positions, norms_of_embeddings],
)
def test_layers_and_attributes_that_somebody_moves(change, when):
    alike = {"qkv_multipliers": 1.0, "num_query_heads": None, "num_kv_heads": None}
    eager, fast = model_of(**alike), model_of(**alike)
    if when == "after":
        accelerate(fast)
        assert_same(fast, eager)
    change(eager)
    change(fast)
    if when == "before":
        accelerate(fast)
    assert_same(fast, eager)


@pytest.mark.parametrize("place", ["q_norm", "k_norm"])
def test_one_norm_of_an_attention_in_another_dtype(place):
    models = model_of(), model_of()
    for model in models:
        model.to(torch.bfloat16).layers[1].attn.get_submodule(place).float()
    accelerate(models[0])
    found = []
    for model in models:
        loss = model.loss(IDS, TARGETS)
        loss.backward()
        found.append([loss, model(IDS), *(p.grad for p in model.parameters())])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("change", ["eps", "dtype"])
@pytest.mark.parametrize("make", [corenet, hugging_face])
def test_norms_of_a_foreign_attention_that_differ(make, change):
    eager, fast = make(), make()
    accelerate(fast)
    for model in (eager, fast):
        k_norm = getattr(model, "transformer", model).layers[1].attn.k_norm
        if change == "eps":
            k_norm.eps = 0.5
        else:
            k_norm.to(torch.bfloat16)
    with torch.inference_mode():
        close(fast(IDS), eager(IDS), change)


@pytest.mark.parametrize(
    "place", ["layers.1.attn", "layers.1.attn.qkv_proj", "layers.1.attn.out_proj", "layers.1.ffn",
              "layers.1.ffn.proj_1", "layers.1.ffn_norm", "norm", "layers.0"],
)  # fmt: skip
def test_a_hook_that_writes_into_an_output(place):
    eager, fast = model_of(), model_of()
    accelerate(fast)
    for model in (eager, fast):
        model.get_submodule(place).register_forward_hook(lambda _, __, out: out.mul_(1.5))
    try:
        eager.loss(IDS, TARGETS).backward()
    except RuntimeError:
        pytest.skip("what the output was made of is needed for gradients")
    assert_same(fast, eager)


@pytest.mark.parametrize("tied", [True, False])
def test_a_second_derivative_of_the_loss_names_its_op(tied):
    model = model_of(share_input_output_layers=tied)
    accelerate(model)
    grads = torch.autograd.grad(
        model.loss(IDS, TARGETS), list(model.parameters()), create_graph=True
    )
    with pytest.raises(NotImplementedError, match='has no second derivative.*"reference"'):
        sum(g.square().sum() for g in grads).backward()
