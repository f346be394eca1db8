"""Adapters and quantized tensors: what PEFT and torchao do to a model, by stand-ins and by them."""

import copy

import pytest
import torch
from helpers.checkpoints import CONFIG
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from elmkernels import OpenELM, accelerate, restore
from elmkernels.acceleration.classes import Fused
from elmkernels.acceleration.projections import Linear
from elmkernels.openelm.layers import DecoderLayer

IDS = torch.arange(2 * 9).view(2, 9) * 7 % CONFIG.vocab_size


def model_of() -> OpenELM:
    return OpenELM(CONFIG, seed=1)


def close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() < 2e-5 * expected.norm()


class LowRank(nn.Module):
    """As PEFT's: the projection it wraps, two small ones, and answers for the first's weight."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        super().__init__()
        self.add_module(name, base)
        self.name = name
        self.down = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    @property
    def weight(self):
        return self.get_submodule(self.name).weight

    def forward(self, x):
        return self.get_submodule(self.name)(x) + self.up["default"](self.down["default"](x))


class Saved(nn.Module):
    """As PEFT's `modules_to_save`: the module, a copy that is trained, and answers for either."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.on = True

    def __getattr__(self, name):
        if "_modules" in self.__dict__ and name not in self.__dict__["_modules"]:
            return getattr(self.active, name)
        return super().__getattr__(name)

    @property
    def active(self):
        modules = self.__dict__["_modules"]
        return (
            modules["copies"]["default"] if self.__dict__.get("on", True) else modules["original"]
        )

    def forward(self, *args, **kwargs):
        return self.active(*args, **kwargs)


def put(model: nn.Module, place: str, make) -> None:
    owner, _, name = place.rpartition(".")
    owner = model.get_submodule(owner) if owner else model
    torch.manual_seed(0)
    owner._modules[name] = make(owner._modules[name])


def shake(model: nn.Module) -> None:
    """Other numbers for what is in copies, and for small projections."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "copies" in name or "up." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def results(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name in ("forward", "loss"):
        model.zero_grad()
        out = model(IDS) if name == "forward" else model.loss(IDS, IDS)
        out.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"{name}: {n}": g for n, g in grads.items()} | {name: out.detach()}
    return found


def assert_same(fast: nn.Module, eager: nn.Module) -> None:
    got, expected = results(fast), results(eager)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        close(got[name], value)


PROJECTED = ["layers.1.attn.qkv_proj", "layers.1.attn.out_proj", "layers.0.ffn.proj_1",
             "layers.1.ffn.proj_2"]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["base_layer", "linear"])
def test_of_a_wrapped_projection_the_base_is_accelerated(name, when):
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        for place in PROJECTED:
            put(model, place, lambda m: LowRank(m, name))
        shake(model)
    if when == "before":
        report = accelerate(fast)
        assert not report.left
        assert report.accelerated["projections"] == 4 * len(fast.layers)
    bases = [fast.get_submodule(f"{place}.{name}") for place in PROJECTED]
    assert all(isinstance(base, Linear) and isinstance(base, nn.Linear) for base in bases)
    assert_same(fast, eager)
    for place, base in zip(PROJECTED, bases, strict=True):  # unloaded
        put(fast, place, lambda _, base=base: base)
    restore(fast)
    assert list(fast.state_dict()) == list(model_of().state_dict())
    assert all(type(base) is nn.Linear for base in bases)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "place",
    ["layers.1.attn_norm", "layers.1.ffn_norm", "layers.1.attn.q_norm", "norm", "tied_head",
     "layers.1.ffn.proj_1", "token_embeddings"],
)  # fmt: skip
def test_modules_to_save_are_called_and_kept(place, when):
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        put(model, place, Saved)
        shake(model)
    if when == "before":
        left = dict(accelerate(fast).left)
        assert place in left or place == "token_embeddings", left
    for on in (True, False, True):
        for model in (eager, fast):
            model.get_submodule(place).on = on
        assert type(fast.get_submodule(place)) is Saved
        assert_same(fast, eager)
    assert list(fast.state_dict()) == list(eager.state_dict())


class Eighth(Tensor):
    """As torchao's: a weight of a tensor class of its own, which multiplies by itself."""

    @staticmethod
    def __new__(cls, dense: Tensor):
        return Tensor._make_wrapper_subclass(cls, dense.shape, dtype=dense.dtype)

    def __init__(self, dense: Tensor) -> None:
        self.eighths = (dense * 8).round()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map(lambda t: t.eighths / 8 if isinstance(t, Eighth) else t, (args, kwargs))
        if func is torch.ops.aten.detach.default:
            return Eighth(args[0].eighths / 8)
        return func(*plain[0], **(plain[1] or {}))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", [*PROJECTED, "layers.1.attn_norm", "layers.1.ffn_norm", "norm",
                                   "layers.1.attn.q_norm"])  # fmt: skip
def test_a_weight_of_another_tensor_class_is_left(place, when):
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        module = model.get_submodule(place)
        module.weight = nn.Parameter(Eighth(module.weight.detach()), requires_grad=False)
    if when == "before":
        assert "a Eighth, not a plain tensor" in dict(accelerate(fast).left)[place]
    with torch.no_grad():
        close(fast(IDS), eager(IDS))
    assert_same(fast, eager)


def lora(model: nn.Module, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **{"target_modules": ["qkv_proj", "proj_1"]} | options)
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped


@pytest.mark.parametrize("when", ["before, inside", "before, outside", "after"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["attn_norm", "ffn_norm"]}])
def test_peft(when, options):
    eager, model = lora(model_of(), **options), model_of()
    if when == "after":
        accelerate(model)
    fast = lora(model, **options)
    if when != "after":
        accelerate(model if when == "before, inside" else fast)
    assert sum(isinstance(m, Fused) for m in fast.modules()) > 5 * len(model.layers)
    assert list(fast.state_dict()) == list(eager.state_dict())
    assert_same(fast, eager)
    with fast.disable_adapter(), eager.disable_adapter(), torch.no_grad():
        close(fast(IDS), eager(IDS))
        close(fast(IDS), model_of()(IDS))
    fast.merge_and_unload(), eager.merge_and_unload()
    restore(model)
    assert not any("lora" in name for name in model.state_dict())
    assert all(isinstance(layer, DecoderLayer) for layer in model.layers)
    with torch.no_grad():
        close(model(IDS), eager.base_model.model(IDS))


def test_peft_saves_and_loads_what_it_trained(tmp_path):
    peft = pytest.importorskip("peft")
    fast = lora(model_of(), modules_to_save=["attn_norm"])
    accelerate(fast)
    fast.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_of(), tmp_path)
    with torch.no_grad():
        close(loaded(IDS), fast(IDS))


@pytest.mark.parametrize("when", ["before", "after"])
def test_torchao(when):
    quantization = pytest.importorskip("torchao.quantization")
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if when == "before":
        left = dict(accelerate(fast).left)
        assert "not a plain tensor" in left["layers.0.attn.qkv_proj"]
    with torch.no_grad():
        close(fast(IDS), eager(IDS))
