"""Activation checkpointing, by whatever means, frees as much in an accelerated model as before."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.foreign import CoreNetLayer, CoreNetModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.acceleration import recompute
from elmkernels.openelm.layers import DecoderLayer

CONFIG = OpenELMConfig(
    num_transformer_layers=4,
    model_dim=64,
    head_dim=16,
    num_gqa_groups=2,
    qkv_multipliers=1.0,
    ffn_multipliers=4.0,
    ffn_dim_divisor=16,
    normalize_qk_projections=True,
    share_input_output_layers=True,
    vocab_size=64,
    rope_max_length=64,
)
IDS = torch.arange(4 * 32).view(4, 32) * 7 % CONFIG.vocab_size


class Alive(TorchDispatchMode):
    """The storages that operations give, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.made[id(storage._cdata), len(self.made)] = (
                    StorageWeakRef(storage),
                    storage.nbytes(),
                )
        return out

    def held(self, apart: set[int]) -> int:
        living = {ref.cdata: n for ref, n in self.made.values() if not ref.expired()}
        return sum(n for cdata, n in living.items() if cdata not in apart)


def held(model: nn.Module, run: Callable) -> int:
    """Bytes that a forward pass leaves for its backward, beside the weights."""
    apart = {p.untyped_storage()._cdata for p in model.parameters()}
    with Alive() as alive:
        out = run(model)
        found = alive.held(apart)
    out.float().mean().backward()
    model.zero_grad(set_to_none=True)
    return found


def by_wrapper(model: nn.Module, kind: type, impl: CheckpointImpl) -> None:
    wrap = partial(checkpoint_wrapper, checkpoint_impl=impl)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, kind)
    )


def by_patch(model: nn.Module, kind: type, reentrant: bool) -> None:
    for module in [m for m in model.modules() if isinstance(m, kind)]:
        module.forward = partial(checkpoint, module.forward, use_reentrant=reentrant)


def by_us(model: nn.Module, kind: type) -> None:
    model.gradient_checkpointing = True


WAYS = {
    "wrapper, reentrant": partial(by_wrapper, impl=CheckpointImpl.REENTRANT),
    "wrapper": partial(by_wrapper, impl=CheckpointImpl.NO_REENTRANT),
    "patched, reentrant": partial(by_patch, reentrant=True),
    "patched": partial(by_patch, reentrant=False),
    "gradient_checkpointing": by_us,
}
MODELS = {
    "ours": (lambda: OpenELM(CONFIG, seed=0), DecoderLayer, lambda m: m(IDS)),
    "our loss": (lambda: OpenELM(CONFIG, seed=0), DecoderLayer, lambda m: m.loss(IDS, IDS)),
    "CoreNet's": (lambda: foreign(), CoreNetLayer, lambda m: m(IDS)),
}


def foreign() -> CoreNetModel:
    model = CoreNetModel(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_it_frees_as_much_as_before(name, way, when):
    make, kind, run = MODELS[name]
    if name == "CoreNet's" and way == "gradient_checkpointing":
        pytest.skip("that is our model's")
    model = make()
    whole = held(model, run)
    eager, fast = copy.deepcopy(model), copy.deepcopy(model)
    accelerate(fast)
    assert held(fast, run) < whole  # without checkpointing too
    WAYS[way](eager, kind)
    if when == "before":
        fast = copy.deepcopy(eager)
        accelerate(fast)
    else:
        WAYS[way](fast, kind)
    little = held(eager, run)
    assert little < whole / 3
    assert held(fast, run) <= little * 1.02


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_without_it(way, autocast):
    results = []
    for checkpointed in (False, True):
        model = OpenELM(CONFIG, seed=0)
        accelerate(model)
        names = [name for name, _ in model.named_parameters()]
        if checkpointed:
            WAYS[way](model, DecoderLayer)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.loss(IDS, IDS).backward()
        results.append(dict(zip(names, [p.grad for p in model.parameters()], strict=True)))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_whoever_decides_what_is_kept_is_left_to_it():
    """save_on_cpu must see every tensor; torch.func forbids hooks; both still give gradients."""
    assert recompute.applies()
    with torch.no_grad():
        assert not recompute.applies()
    model = OpenELM(CONFIG, seed=0)
    accelerate(model)
    model.loss(IDS, IDS).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.save_on_cpu():
        assert not recompute.applies()
        loss = model.loss(IDS, IDS)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"):
        assert not recompute.applies()
        model(IDS)
