"""What hangs on a matrix's module when it is replaced: hooks go over, the rest is refused."""

import pytest
import torch
from helpers.checkpoints import SMALL
from torch import nn
from torch.nn.utils import parametrize, prune

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize, unpack

UNTIED = OpenELMConfig.from_hf_dict(SMALL.to_hf_dict() | {"share_input_output_layers": False})
IDS = torch.tensor([[1, 2, 3, 4]])
PLACES = ("token_embeddings", "layers.0.attn.qkv_proj", "layers.1.ffn.proj_2", "classifier")
DEEDS = {
    "8 bits": lambda m: quantize(m, 8, 32, progress=False),
    "packed": lambda m: pack(m, progress=False),
    "packed and unpacked": lambda m: (pack(m, progress=False), unpack(m, progress=False)),
    "packed, then 4 bits": lambda m: (pack(m, progress=False), quantize(m, 4, 32, progress=False)),
}
HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, y: y * 2),
    "forward, with keywords": lambda m: m.register_forward_hook(
        lambda m, args, kwargs, y: y * 2 + len(kwargs), with_kwargs=True
    ),
    "forward, always called": lambda m: m.register_forward_hook(
        lambda m, args, y: y * 2, always_call=True
    ),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 0 + 1,)),
    "pre, with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 0 + 1,), kwargs), with_kwargs=True
    ),
}
BACKWARD = {
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


def made(seed=1):
    return OpenELM.from_config(UNTIED, seed=seed, dtype=torch.bfloat16)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_hooks_go_over_and_can_be_removed(place, deed, kind, accelerated):
    model, late, bare = made(), made(), made()
    if accelerated:
        for m in (model, late, bare):
            accelerate(m)
    handle = HOOKS[kind](model.get_submodule(place))
    for m in (model, late, bare):
        DEEDS[deed](m)
    HOOKS[kind](late.get_submodule(place))  # what the hook does there, hung on afterwards
    assert torch.equal(model(IDS), late(IDS))
    assert not torch.equal(model(IDS), bare(IDS))
    handle.remove()
    assert torch.equal(model(IDS), bare(IDS))


@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("place", PLACES[1:])
def test_backward_hooks_go_over(place, deed, kind):
    model, seen = made(), []
    BACKWARD[kind](model.get_submodule(place), seen)
    DEEDS[deed](model)
    x = torch.ones(1, model.get_submodule(place).in_features, dtype=torch.bfloat16)
    model.get_submodule(place)(x.requires_grad_()).sum().backward()
    assert seen == [1]


class Halved(nn.Module):
    def forward(self, w):
        return w / 2


REFUSED = {
    "its own forward": (
        lambda m: setattr(m, "forward", lambda x, old=m.forward: old(x) * 2),
        "it has a forward of its own",
    ),
    "compiled": (lambda m: m.compile(), "it is compiled by itself"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", Halved()),
        "it is parametrized",
    ),
    "pruned": (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "it must hold a weight alone, got weight_mask, weight_orig",
    ),
    "a child": (
        lambda m: m.add_module("adapter", nn.Identity()),
        "it must hold a weight alone, got adapter, weight",
    ),
    "a state_dict hook": (
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        "it has hooks on its state_dict",
    ),
    "a state_dict pre hook": (
        lambda m: m.register_state_dict_pre_hook(lambda *_: None),
        "it has hooks on its state_dict",
    ),
    "a load hook": (
        lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
        "it has hooks on its state_dict",
    ),
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("deed", ["8 bits", "packed"])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_what_could_not_go_over_is_refused(place, deed, what, accelerated):
    model = made()
    change, reason = REFUSED[what]
    change(model.get_submodule(place))
    if accelerated:
        accelerate(model)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"{place}: {reason}"):
        DEEDS[deed](model)
    assert {name: id(m) for name, m in before.items()} == {
        name: id(m) for name, m in model.named_modules()
    }


@pytest.mark.parametrize("what", ["its own forward", "compiled", "a load hook"])
@pytest.mark.parametrize("deed", ["4 bits", "unpacked"])
def test_the_same_of_packed_modules(deed, what):
    model = made()
    pack(model, progress=False)
    change, reason = REFUSED[what]
    change(model.layers[0].attn.qkv_proj)
    with pytest.raises(ValueError, match=f"layers.0.attn.qkv_proj: {reason}"):
        quantize(model, 4, 32, progress=False) if deed == "4 bits" else unpack(model)
