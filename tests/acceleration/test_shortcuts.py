"""No shortcut goes past a module on which something hangs: hooks of every kind, own forwards,
parametrizations, pruning, subclasses, before and after `accelerate`, in every pass.
"""

import copy

import pytest
import torch
from helpers.checkpoints import CONFIG
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from elmkernels import OpenELM, OpenELMConfig, accelerate, generate
from elmkernels.acceleration.projections import Products
from elmkernels.openelm import KVCache, next_logits
from elmkernels.openelm.layers import Attention, DecoderLayer, FeedForward, RMSNorm
from elmkernels.surgery import missing_plain, plain

IDS = torch.arange(2 * 9).view(2, 9) * 7 % CONFIG.vocab_size
TARGETS = IDS.roll(-1, 1)
LAYER = "layers.1"
PLACES = [
    f"{LAYER}{path}"
    for path in (
        "", ".attn", ".ffn", ".attn_norm", ".ffn_norm", ".attn.qkv_proj", ".attn.out_proj",
        ".attn.q_norm", ".attn.k_norm", ".ffn.proj_1", ".ffn.proj_2",
    )
] + ["norm", "tied_head", "token_embeddings", "logits_head", "loss_head"]  # fmt: skip


def model_of(**changes) -> OpenELM:
    return OpenELM(OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | changes), seed=1)


def forward_hook(m: nn.Module) -> None:
    m.register_forward_hook(lambda _, __, out: out * 1.5)


def pre_hook(m: nn.Module) -> None:
    def scale(_, args):
        first = next(i for i, a in enumerate(args) if isinstance(a, Tensor))
        x = args[first]  # ids: other ones
        x = x * 1.5 if x.is_floating_point() else (x + 1) % CONFIG.vocab_size
        return (*args[:first], x, *args[first + 1 :])

    m.register_forward_pre_hook(scale)


def in_place_pre_hook(m: nn.Module) -> None:
    def scale(_, args):
        if args[0].is_floating_point():
            args[0].data.mul_(1.5)

    m.register_forward_pre_hook(scale)


def _floats(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def full_backward_hook(m: nn.Module) -> None:
    m.register_full_backward_hook(
        lambda _, given, __: tuple(g * 1.5 if _floats(g) else g for g in given)
    )


def full_backward_pre_hook(m: nn.Module) -> None:
    m.register_full_backward_pre_hook(lambda _, grad: tuple(g * 1.5 for g in grad))


def own_forward(m: nn.Module) -> None:
    before = m.forward
    m.forward = lambda *args, **kwargs: before(*args, **kwargs) * 1.5


CHANGES = [forward_hook, pre_hook, full_backward_hook, full_backward_pre_hook, own_forward]


def close(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    error = (got - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < 2e-5, f"{what}: {error}"


def assert_same(fast: OpenELM, eager: OpenELM) -> None:
    """Logits, the loss, every gradient of both, and decoding with a cache."""
    results = []
    for model in (fast, eager):
        model.zero_grad()
        found = {"logits": model(IDS)}
        found["logits"].square().mean().backward()
        found |= {f"logits' {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found["loss"] = model.loss(IDS, TARGETS)
        found["loss"].backward()
        found |= {f"loss' {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        cache = KVCache(model.config, 2, 12)
        with torch.inference_mode():
            found["prompt"] = model(IDS[:, :4], cache=cache)
            found["step"] = next_logits(model, IDS[:, 4], cache)
            found["next"] = next_logits(model, IDS[:, 5], cache)
        results.append(found)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        close(value, results[1][name], name)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_what_hangs_on_a_module_is_called_in_every_pass(place, change, when):
    eager, fast = model_of(), model_of()
    if change is full_backward_hook and place == "token_embeddings":
        pytest.skip("its input has no gradient")
    if when == "after":
        accelerate(fast)
        assert_same(fast, eager)  # what was remembered of it must not be used afterwards
    for model in (eager, fast):
        change(model.get_submodule(place))
    if when == "before":
        report = accelerate(fast)
        assert place in dict(report.left), report.left
    assert_same(fast, eager)


@pytest.mark.parametrize("place", [f"{LAYER}.attn.qkv_proj", f"{LAYER}.ffn.proj_1"])
def test_an_input_that_a_hook_changed_in_place_is_not_made_again(place):
    eager, fast = model_of(), model_of()
    accelerate(fast)
    for model in (eager, fast):
        in_place_pre_hook(model.get_submodule(place))
    assert_same(fast, eager)


@pytest.mark.parametrize("untied", [False, True])
def test_a_hook_on_all_modules_sees_them_all(untied):
    changes = {"share_input_output_layers": False} if untied else {}
    eager, fast = model_of(**changes), model_of(**changes)
    accelerate(fast)
    fast.loss(IDS, TARGETS)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(names[id(m)]))
    found = []
    try:
        for model in (eager, fast):
            names = {id(m): n for n, m in model.named_modules()}
            model(IDS), model.loss(IDS, TARGETS)
            found.append(seen[:])
            del seen[:]
    finally:
        hook.remove()
    assert found[0] == found[1] and len(found[0]) > 50


def test_observers_on_everything_are_called_as_often():
    counts = []
    for fused in (False, True):
        model, seen = model_of(), []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, n=name, seen=seen: seen.append(n))
        if fused:
            accelerate(model)
        model(IDS), model.loss(IDS, TARGETS).backward()
        generate(model, IDS[:, :3], 3)
        counts.append(seen)
    assert counts[0] == counts[1]


class Doubled(nn.Module):
    def forward(self, w):
        return w * 2


def parametrized(m: nn.Module) -> None:
    parametrize.register_parametrization(m, "weight", Doubled())


def pruned(m: nn.Module) -> None:
    prune.l1_unstructured(m, "weight", 0.5)


WEIGHTED = [p for p in PLACES if p.endswith(("proj", "_1", "_2", "norm"))]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [parametrized, pruned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", WEIGHTED)
def test_computed_weights_stay_so(place, change, when):
    eager, fast = model_of(), model_of()
    if when == "after":
        accelerate(fast)
    for model in (eager, fast):
        change(model.get_submodule(place))
    if when == "before":
        accelerate(fast)
    names = [n for n, _ in eager.named_parameters()]
    assert [n for n, _ in fast.named_parameters()] == names
    assert_same(fast, eager)
    for model in (eager, fast):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert_same(fast, eager)


def subclass_of(kind: type[nn.Module], method: str) -> type[nn.Module]:
    def changed(self, *args, **kwargs):
        return getattr(super(made, self), method)(*args, **kwargs) * 1.5

    made = type(f"Own{kind.__name__}", (kind,), {method: changed})
    return made


@pytest.mark.parametrize("again", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("place", "kind", "method"),
    [
        (LAYER, DecoderLayer, "forward"),
        (f"{LAYER}.attn", Attention, "forward"),
        (f"{LAYER}.attn", Attention, "attended"),
        (f"{LAYER}.ffn", FeedForward, "forward"),
        (f"{LAYER}.ffn.proj_2", nn.Linear, "forward"),
        (f"{LAYER}.attn_norm", RMSNorm, "__call__"),
        ("norm", RMSNorm, "__call__"),
    ],
)
def test_a_subclass_computes_what_it_says(place, kind, method, again):
    eager, fast = model_of(), model_of()
    if again:
        accelerate(fast)
    own = subclass_of(kind, method)
    for model in (eager, fast):
        model.get_submodule(place).__class__ = own
    report = accelerate(fast)
    assert own.__name__ in dict(report.left)[place]
    assert_same(fast, eager)


def test_a_model_with_a_projection_of_its_own_is_asked():
    class Capped(OpenELM):
        def project(self, hidden):
            return super().project(hidden).tanh()

    eager, fast = Capped(CONFIG, seed=1), Capped(CONFIG, seed=1)
    accelerate(fast)
    assert_same(fast, eager)


def test_plain_says_no_with_a_reason_and_yes_for_every_module_of_a_model():
    model = model_of()
    modules = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    assert all(map(plain, modules))
    accelerate(model)
    assert all(map(plain, modules))
    assert not plain(None) and not plain(nn.Identity()) and not plain(nn.LayerNorm(3))
    for change in (*CHANGES, parametrized, pruned):
        linear = nn.Linear(3, 3)
        change(linear)
        assert not plain(linear) and missing_plain(linear), change
    linear = nn.Linear(3, 3)
    linear.compile(backend="eager")
    assert not plain(linear) and missing_plain(linear)


def test_a_removed_hook_brings_the_shortcut_back(monkeypatch):
    from elmkernels import ops

    model, calls = model_of(), []
    accelerate(model)
    fused = ops.add_rms_norm
    monkeypatch.setattr(ops, "add_rms_norm", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model(IDS)
    assert len(calls) == len(model.layers)
    handle = model.layers[1].ffn_norm.register_forward_hook(lambda *_: None)
    model(IDS)
    assert len(calls) == 2 * len(model.layers) - 1
    handle.remove()
    model(IDS)
    assert len(calls) == 3 * len(model.layers) - 1


def test_a_copy_of_a_hooked_model_has_the_hooks():
    eager, fast = model_of(), model_of()
    accelerate(fast)
    for model in (eager, fast):
        forward_hook(model.layers[1].attn)
    assert_same(copy.deepcopy(fast), eager)


LAST = f"layers.{CONFIG.num_transformer_layers - 1}"


def last_logits(model: OpenELM, keep: int, how: str) -> Tensor:
    """The logits of the last positions, by a prompt in one of the forms that it comes in."""
    with torch.inference_mode():
        if how == "alone":
            return model(IDS, logits_to_keep=keep)
        cache = KVCache(model.config, 2, 16)
        if how == "counts":
            return model(IDS, cache=cache, logits_to_keep=keep, counts=[9, 4])
        model(IDS[:, :4], cache=cache, logits_to_keep=1)
        return model(IDS[:, 4:], cache=cache, logits_to_keep=keep)


@pytest.mark.parametrize("how", ["alone", "cached", "counts"])
@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_last_layer_leaves_out_what_nobody_asks_for(monkeypatch, how, keep):
    """What follows attention there; its keys and values are those of all positions."""
    eager, fast = model_of(), model_of()
    accelerate(fast)
    rows = []
    own = Products.__call__

    def count(products: Products, x: Tensor, weight: Tensor) -> Tensor:
        if weight is fast.get_submodule(f"{LAST}.ffn.proj_1").weight:
            rows.append(x.shape[1])
        return own(products, x, weight)

    monkeypatch.setattr(Products, "__call__", count)
    close(last_logits(fast, keep, how), last_logits(eager, keep, how), how)
    length = 5 if how == "cached" else 9
    assert rows[-1] == min(keep, length)
    with torch.enable_grad():
        fast(IDS, logits_to_keep=keep)
    assert rows[-1] == 9


@pytest.mark.parametrize("kind", ["hook", "own forward", "subclass"])
@pytest.mark.parametrize(
    "path", ["", ".attn", ".attn.out_proj", ".ffn", ".ffn_norm", ".ffn.proj_1", ".ffn.proj_2"]
)
def test_what_hangs_on_the_last_layer_sees_every_position(path, kind):
    eager, fast = model_of(), model_of()
    accelerate(fast)
    seen: list[list[int]] = [[], []]
    for model, lengths in zip((eager, fast), seen, strict=True):
        module = model.get_submodule(LAST + path)
        if kind == "hook":
            module.register_forward_hook(lambda m, i, out, n=lengths: n.append(out.shape[1]))
        elif kind == "own forward":
            before = module.forward
            module.forward = lambda *a, b=before, n=lengths: n.append(a[0].shape[1]) or b(*a)
        else:
            cls = type(module)

            def forward(self, *args, cls=cls, n=lengths):
                n.append(args[0].shape[1])
                return cls.forward(self, *args)

            module.__class__ = type("Watched", (cls,), {"forward": forward})
    close(last_logits(fast, 1, "alone"), last_logits(eager, 1, "alone"), path)
    assert seen[0] == seen[1] == [9]
