"""Acceleration by class: every module stays the same object, wrappers are looked through, any copy
works, and a failure half way leaves everything as it was.
"""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from helpers.checkpoints import CONFIG
from helpers.foreign import corenet, hugging_face
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils import parametrize

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration import classes, swap
from elmkernels.acceleration.classes import Fused, fuse, fused_class, own_class, unfuse
from elmkernels.acceleration.fused import FusedRMSNorm, State
from elmkernels.acceleration.projections import Linear
from elmkernels.acceleration.routines import PREPACKED, Plan
from elmkernels.openelm.layers import Attention, DecoderLayer, FeedForward, RMSNorm
from elmkernels.surgery import has_mark

IDS = torch.arange(2 * 9).view(2, 9) * 7 % CONFIG.vocab_size
FUSED = ("layers.1", "layers.1.attn", "layers.1.ffn", "layers.1.attn_norm", "layers.1.ffn.proj_1",
         "norm", "tied_head", "logits_head", "loss_head")  # fmt: skip


def model_of() -> OpenELM:
    return OpenELM(CONFIG, seed=1)


def classes_of(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules()}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("make", [model_of, corenet, hugging_face])
def test_every_module_stays_itself_and_gets_its_class_back(make):
    model = make()
    before, modules = classes_of(model), dict(model.named_modules())
    attributes = {name: sorted(vars(m)) for name, m in modules.items()}
    keys, parameters = list(model.state_dict()), list(model.parameters())
    accelerate(model)
    changed = {name for name, m in model.named_modules() if type(m) is not before[name]}
    assert len(changed) > 8 * 3
    for name, module in model.named_modules():
        assert module is modules[name] and isinstance(module, before[name])
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.load_state_dict(model.state_dict()).missing_keys == []
    restore(model)
    assert classes_of(model) == before
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes


def test_a_projection_stays_a_linear():
    model = model_of()
    accelerate(model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 4 * len(model.layers)
    assert all(isinstance(m, Linear) for m in linears)
    assert f"in_features={CONFIG.model_dim}" in repr(linears[0])


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "protocol 2": lambda m: pickle.loads(pickle.dumps(m, 2)),
    "torch.save": lambda m: saved(m),
}


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("make", [model_of, corenet, hugging_face])
def test_copies_are_of_the_same_classes_and_can_be_restored(make, copier):
    model = make()
    accelerate(model, plan=Plan(PREPACKED, PREPACKED, PREPACKED))
    with torch.inference_mode():
        expected = model(IDS)
        other = COPIERS[copier](model)
        assert classes_of(other) == classes_of(model)
        assert torch.equal(other(IDS), expected)
        restore(other)
        close(other(IDS), expected)
        assert any(isinstance(m, Fused) for m in model.modules())
        assert not any(isinstance(m, Fused) for m in other.modules())


class Reduced(RMSNorm):
    """A class that pickles itself in a way of its own."""

    def __reduce_ex__(self, protocol):
        return _reduced, (self.weight.detach(), self.eps), vars(self) | {"came": "by reduce"}


def _reduced(weight: torch.Tensor, eps: float) -> Reduced:
    return Reduced(len(weight), eps)


class Stateful(RMSNorm):
    """A class with a state of its own."""

    def __getstate__(self):
        return vars(self) | {"came": "by state"}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("base", [Reduced, Stateful, RMSNorm])
def test_any_base_class_can_be_copied(base, copier):
    norm = base(8, 1e-6)
    nn.init.uniform_(norm.weight)
    fuse(norm, FusedRMSNorm, State("reference"))
    other = COPIERS[copier](norm)
    assert type(other) is type(norm) is fused_class(FusedRMSNorm, base)
    assert other._fused == State("reference") and torch.equal(other.weight, norm.weight)
    assert base is RMSNorm or other.came.startswith("by ")


def test_what_was_put_on_top_of_a_fused_class_stays_on_top():
    """As FSDP2 and parametrizations put it."""
    linear = nn.Linear(4, 4, bias=False)
    model = model_of()
    accelerate(model)
    linear = model.layers[0].ffn.proj_1
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    on_top = type(linear)
    assert issubclass(on_top, Linear)
    restore(model)
    assert not isinstance(linear, Fused) and parametrize.is_parametrized(linear)
    assert type(linear).__bases__ == (nn.Linear,)
    parametrize.remove_parametrizations(linear, "weight")
    assert type(linear) is nn.Linear
    assert own_class(on_top) is own_class(on_top)


def test_unfuse_leaves_other_modules_alone():
    linear = nn.Linear(2, 2)
    before = dict(vars(linear))
    unfuse(linear)
    assert type(linear) is nn.Linear and vars(linear) == before


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


class Passing(nn.Module):
    """A wrapper that forwards nothing but the call."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, *args, **kwargs):
        return self.held(*args, **kwargs) * 1.25


class Answering(Passing):
    """A wrapper that answers for what it holds."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("held"), name)


WRAPPERS = [compiled, checkpoint_wrapper, Passing, Answering]
WRAPPED = ["layers.1", "layers.1.attn", "layers.1.ffn", "layers.1.attn_norm", "layers.1.ffn_norm",
           "layers.1.attn.qkv_proj", "layers.1.ffn.proj_2", "norm", "tied_head",
           "loss_head"]  # fmt: skip


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(fast: OpenELM, eager: OpenELM) -> None:
    with torch.inference_mode():
        close(fast(IDS), eager(IDS))
    for make in (lambda m: m(IDS).square().mean(), lambda m: m.loss(IDS, IDS)):
        got, expected = gradients(fast, make(fast)), gradients(eager, make(eager))
        assert got.keys() == expected.keys()
        for name in got:
            close(got[name], expected[name])


# torch.compile takes a second or two each time.
CASES = [
    pytest.param(place, wrap, id=f"{place}-{wrap.__name__}")
    for place in WRAPPED
    for wrap in WRAPPERS
    if wrap is not compiled or place in ("layers.1", "layers.1.attn", "norm", "loss_head")
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("place", "wrap"), CASES)
def test_wrapped_modules_are_looked_through(place, wrap, when):
    torch._dynamo.reset()
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        owner, _, name = place.rpartition(".")
        owner = model.get_submodule(owner) if owner else model
        owner._modules[name] = wrap(owner._modules[name])
    if when == "before":
        report = accelerate(fast)
        assert not report.left, report.left
        assert report.accelerated["layers"] == len(fast.layers)
    assert isinstance(inside(fast.get_submodule(place)), Fused)
    keys = list(fast.state_dict())
    assert keys == list(eager.state_dict())
    assert_same(fast, eager)
    restore(fast)
    assert not any(isinstance(m, Fused) for m in fast.modules())
    assert list(fast.state_dict()) == keys
    assert_same(fast, eager)


def inside(module: nn.Module) -> nn.Module:
    while len(module._modules) == 1:
        (module,) = module._modules.values()
    return module


@pytest.mark.parametrize("kind", [DecoderLayer, Attention, FeedForward])
@pytest.mark.parametrize("when", ["before", "after"])
def test_policies_by_class_find_the_modules(kind, when):
    eager, fast = model_of(), model_of()
    for step in ("policy", "accelerate") if when == "before" else ("accelerate", "policy"):
        if step == "accelerate":
            accelerate(fast)
        else:
            apply_activation_checkpointing(fast, check_fn=lambda m: isinstance(m, kind))
    wrapped = [m for m in fast.modules() if type(m).__name__ == "CheckpointWrapper"]
    assert len(wrapped) == len(fast.layers)
    assert all(isinstance(inside(m), Fused) or kind is not FeedForward for m in wrapped)
    with torch.inference_mode():
        close(fast(IDS), eager(IDS))
    got = gradients(fast, fast.loss(IDS, IDS))
    expected = gradients(eager, eager.loss(IDS, IDS))
    for (_, a), (_, b) in zip(got.items(), expected.items(), strict=True):
        close(a, b)


class Transformed(nn.Module):
    """As an ecosystem's class holds ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.transformer = model

    def forward(self, ids):
        return self.transformer(ids)


class Owner(nn.Module):
    """Someone's own model round ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.extra = model, nn.Linear(3, 3)

    def forward(self, ids):
        return self.backbone(ids)


ROOTS = [compiled, Answering, Owner, nn.Sequential, Transformed]


@pytest.mark.parametrize("make", [model_of, corenet, hugging_face])
@pytest.mark.parametrize("wrap", ROOTS, ids=lambda w: w.__name__)
def test_a_wrapped_model_is_accelerated_inside(wrap, make):
    torch._dynamo.reset()
    model, eager = make(), make()
    whole = wrap(model)
    keys, children = list(whole.state_dict()), [n for n, _ in whole.named_children()]
    with torch.inference_mode():
        expected = whole(IDS)
        report = accelerate(whole)
        assert list(whole.state_dict()) == keys
        assert [n for n, _ in whole.named_children()] == children
        direct = make()
        assert report.accelerated == accelerate(direct).accelerated
        assert classes_of(direct) == classes_of(model)
        close(whole(IDS), expected)
        accelerate(whole)
        restore(whole)
        assert not any(map(has_mark, whole.modules()))
        assert classes_of(model) == classes_of(eager) and list(whole.state_dict()) == keys
        close(whole(IDS), expected)
    with pytest.raises(ValueError, match="must be accelerated to be restored"):
        restore(whole)


def test_a_compiled_model_that_ran_runs_fused_after_accelerate(monkeypatch):
    torch._dynamo.reset()
    model = model_of()
    whole, calls = torch.compile(model, backend="eager"), []
    with torch.inference_mode():
        expected = whole(IDS)
        accelerate(model)
        fused = swap.fused.FusedDecoderLayer.forward
        monkeypatch.setattr(
            swap.fused.FusedDecoderLayer,
            "forward",
            lambda self, *args: calls.append(1) or fused(self, *args),
        )
        close(whole(IDS), expected)
    assert calls


def test_two_models_in_one_are_refused():
    both = nn.ModuleList([model_of(), model_of()])
    before = classes_of(both)
    with pytest.raises(ValueError, match="holds several models, 0, 1"):
        accelerate(both)
    assert classes_of(both) == before


@pytest.mark.parametrize("again", [False, True], ids=["reference", "accelerated"])
@pytest.mark.parametrize("after", [0, 1, 7, 30])
def test_a_failure_at_any_module_undoes_itself(monkeypatch, after, again):
    model = model_of()
    model.layers[1].ffn.register_forward_hook(lambda *_: None)
    if again:
        accelerate(model, backend="reference", plan=Plan())
    state = {n: (type(m), dict(vars(m))) for n, m in model.named_modules()}
    done = []

    def failing(*args):
        done.append(1)
        if len(done) > after:
            raise KeyboardInterrupt
        return fuse(*args)

    monkeypatch.setattr(swap, "fuse", failing)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules()} == state


def test_the_classes_are_made_once():
    first, second = model_of(), model_of()
    accelerate(first), accelerate(second)
    assert classes_of(first) == classes_of(second)
    assert {k for k, _ in classes._MADE} >= {FusedRMSNorm, Linear}


@pytest.mark.parametrize("place", FUSED)
def test_a_forward_that_was_kept_bound_outlives_restore(place):
    """As a patched forward keeps it that checkpoints, or that someone's hooks are wrapped in."""
    model, eager = model_of(), model_of()
    accelerate(model)
    module = model.get_submodule(place)
    module.forward = partial(module.forward)
    with torch.inference_mode():
        close(model(IDS), eager(IDS))
    restore(model)
    assert_same(model, eager)
    accelerate(model)
    assert_same(model, eager)
