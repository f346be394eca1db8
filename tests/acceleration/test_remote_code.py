"""A whole model of others' code: its mask is kept, its head and loss are the fused ones."""

import copy
import pickle
import re

import pytest
import torch
from helpers.foreign import Cache, corenet
from helpers.foreign.remote_code import Body, Model, Output, remote_code
from torch import nn

from elmkernels import accelerate, ops, restore
from elmkernels.acceleration import projections
from elmkernels.acceleration.routines import STREAM, Plan

IDS = torch.arange(4, 4 + 2 * 9).view(2, 9) * 7 % 300
ONES = torch.ones_like(IDS)
MASKS = {
    "none": None,
    "ones": ONES,
    "other than zero": ONES * 3,
    "on the left": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]),
    "on the right": torch.tensor([[1] * 9, [1, 1, 1, 1, 1, 0, 0, 0, 0]]),
    "in between": torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1, 0, 1]]),
    "everywhere": 0 * ONES,
    "in floats": torch.tensor([[0.0] + [1.0] * 8, [1.0] * 9]),
    "of four dimensions": torch.ones(2, 1, 9, 9),
}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).norm() <= 2e-5 * expected.norm()


def pair(tied: bool = True, **how) -> tuple[Model, Model]:
    eager, fast = remote_code(tied), remote_code(tied)
    report = accelerate(fast, **how)
    assert report.accelerated["models"] == report.accelerated["bodies"] == 1 and not report.left
    return eager, fast


def counted(monkeypatch, owner, name: str) -> list:
    calls, own = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(1) or own(*a, **k))
    return calls


def gradients(model: Model, **how) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(IDS, **how).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_all_kinds(mask, attention):
    eager, fast = pair()
    how = {"attention_mask": MASKS[mask], "output_hidden_states": True}
    for model in (eager, fast):
        model.config._attn_implementation = attention
    with torch.inference_mode():
        for _ in range(2):  # the second is given what the first kept
            got, expected = fast(IDS, **how), eager(IDS, **how)
            for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
                close(a, b)
            close(got.logits, expected.logits)
    for a, b in zip(*(gradients(m, **how, labels=IDS) for m in (fast, eager)), strict=True):
        close(a, b)


# While 5, 1, 1 and 2 tokens are decoded: how often a mask is made, as other tokens are padding, and
# in how many of these passes nothing is padded, so that attention is causal.
MADE = {
    "none": (1, 4),
    "ones": (1, 4),
    "on the left": (1, 0),
    "on the right": (4, 1),
    "in between": (3, 0),
}


@pytest.mark.parametrize("mask", MADE)
def test_a_mask_is_made_once_while_tokens_are_decoded(monkeypatch, mask):
    eager, fast = pair()
    steps, caches = IDS.split([5, 1, 1, 2], dim=1), (Cache(), Cache())
    given, logits = MASKS[mask], ([], [])
    made = counted(monkeypatch, Body, "_update_causal_mask")
    ours = counted(monkeypatch, ops, "attention")
    with torch.inference_mode():
        for model, cache, out in zip((fast, eager), caches, logits, strict=True):
            seen = 0
            for chunk in steps:
                seen += chunk.shape[1]
                how = {} if given is None else {"attention_mask": given[:, :seen]}
                out.append(model(chunk, past_key_values=cache, use_cache=True, **how).logits)
            if model is fast:
                assert (len(made), len(ours) // len(fast.transformer.layers)) == MADE[mask]
    close(*(torch.cat(parts, 1) for parts in logits))


def test_a_kept_mask_is_of_one_kind():
    """Another dtype, another implementation, another buffer, a write: made anew; also a batch."""
    eager, fast = pair()
    with torch.inference_mode():
        fast(IDS)
        fast(IDS, attention_mask=MASKS["on the left"])
        for model in (eager, fast):
            model.config._attn_implementation = "sdpa"
        how = {"attention_mask": MASKS["on the left"], "output_hidden_states": True}
        for _ in range(2):
            close(fast(IDS, **how).hidden_states[-1], eager(IDS, **how).hidden_states[-1])
        close(fast(IDS[:1]).logits, eager(IDS[:1]).logits)
    for model in (eager, fast):
        model.transformer.register_buffer("causal_mask", torch.zeros(256, 256).bool())
    with torch.inference_mode():
        close(fast(IDS).logits, eager(IDS).logits)
    for model in (eager, fast):
        model.transformer.causal_mask.copy_(torch.ones(256, 256).triu(2))
    with torch.inference_mode():
        close(fast(IDS).logits, eager(IDS).logits)
        longer = torch.arange(300)[None] % 300
        close(fast(longer).logits, eager(longer).logits)  # a context is as long as it has to be
        close(fast(IDS).logits, eager(IDS).logits)
    assert fast.bfloat16()(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("write", [False, True])
def test_a_hook_may_change_the_mask(write):
    """It is no causal one then, and what is kept stays as it was."""
    eager, fast = pair()

    def hide_the_first(_, args):
        x, mask, *rest = args
        mask = mask if write else mask.clone()
        mask[..., :, 0:1] = torch.finfo(mask.dtype).min
        return x, mask, *rest

    with torch.no_grad():
        fast(IDS)
        hooks = [
            m.transformer.layers[0].register_forward_pre_hook(hide_the_first) for m in (eager, fast)
        ]
        for _ in range(2):
            if write:  # a row of the batch is all of them in the mask that is kept
                close(fast(IDS[:1]).logits, eager(IDS[:1]).logits)
            else:
                close(fast(IDS).logits, eager(IDS).logits)
        for hook in hooks:
            hook.remove()
        close(fast(IDS).logits, eager(IDS).logits)


def test_other_positions_keep_the_mask(monkeypatch):
    eager, fast = pair()
    ours = counted(monkeypatch, ops, "attention")
    with torch.inference_mode():
        how = {"cache_position": torch.arange(9).flip(0)}
        masks = [
            m.transformer._update_causal_mask(None, torch.zeros(2, 9, 256)) for m in (eager, fast)
        ]
        assert torch.equal(*masks)
        fast(IDS, **how)
        assert not ours
        close(fast(IDS, cache_position=torch.arange(9)).logits, eager(IDS).logits)
        assert len(ours) == len(fast.transformer.layers)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_loss_makes_no_logits(monkeypatch, tied, ignored):
    eager, fast = pair(tied)
    labels = IDS.masked_fill(MASKS["in between"] == 0, -100) if ignored else IDS
    losses = counted(monkeypatch, ops, "linear_cross_entropy")
    heads = counted(monkeypatch, projections.Products, "__call__")
    out = fast(IDS, labels=labels)
    assert len(losses) == 1 and len(heads) == 4 * len(fast.transformer.layers)
    expected = eager(IDS, labels=labels)
    assert isinstance(out, Output) and isinstance(out["loss"], torch.Tensor)
    close(out.loss, expected.loss)
    close(out.logits, expected.logits)
    close(out[1], expected[1])
    assert len(out.to_tuple()) == len(expected.to_tuple())
    for a, b in zip(*(gradients(m, labels=labels) for m in (fast, eager)), strict=True):
        close(a, b)


def test_a_loss_of_logits():
    """Without gradients, as a tuple, of labels that don't fit, of none that counts."""
    eager, fast = pair()
    with torch.inference_mode():
        for a, b in zip(
            *(m(IDS, labels=IDS, return_dict=False) for m in (fast, eager)), strict=True
        ):
            close(a, b)
        close(fast(IDS, labels=IDS).loss, eager(IDS, labels=IDS).loss)
    assert fast(IDS, labels=IDS, return_dict=False)[0].requires_grad
    assert (
        fast(IDS, labels=0 * IDS - 100).loss.isnan()
        and eager(IDS, labels=0 * IDS - 100).loss.isnan()
    )
    for model in (eager, fast):
        with pytest.raises(ValueError, match="batch_size"):
            model(IDS, labels=IDS[:, :4])
        with pytest.raises((IndexError, ValueError), match=r"out of bounds|must be"):
            model(IDS, labels=IDS + 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_losses_have_the_models_dtype(dtype):
    eager, fast = remote_code().to(dtype), remote_code().to(dtype)
    accelerate(fast)
    got, expected = fast(IDS, labels=IDS).loss, eager(IDS, labels=IDS).loss
    assert got.dtype == expected.dtype
    assert (got - expected).abs() <= 3 * torch.finfo(dtype).eps * expected


def test_autocast_and_checkpointing():
    eager, fast = pair()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast(IDS, labels=IDS).loss, eager(IDS, labels=IDS).loss
    assert got.dtype == expected.dtype and (got - expected).abs() < 0.05
    for model in (eager, fast):
        model.train()
        model.transformer.gradient_checkpointing = True
    for mask in (None, MASKS["on the left"]):
        how = {"labels": IDS, "attention_mask": mask}
        for a, b in zip(*(gradients(m, **how) for m in (fast, eager)), strict=True):
            close(a, b)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_takes_the_plans_routine(monkeypatch, tied, rows):
    eager, fast = pair(tied, plan=Plan(STREAM, STREAM))
    streamed = counted(monkeypatch, projections, "stream")
    with torch.inference_mode():
        close(fast(IDS[:rows, :1]).logits, eager(IDS[:rows, :1]).logits)
    assert len(streamed) == 4 * len(fast.transformer.layers) + 1


class Adapter(nn.Module):
    """What wraps a projection."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 1.5


def test_a_head_that_is_more_than_a_product_is_called():
    eager, fast = pair(False)
    for model in (eager, fast):
        model.lm_head = Adapter(model.lm_head)
    for again in (False, True):
        if again:
            accelerate(fast)
        for a, b in zip(*(gradients(m, labels=IDS) for m in (fast, eager)), strict=True):
            close(a, b)
    eager, fast = pair(False)
    for model in (eager, fast):
        model.lm_head.register_forward_hook(lambda _, __, out: out * 1.5)
    for a, b in zip(*(gradients(m, labels=IDS) for m in (fast, eager)), strict=True):
        close(a, b)


class Windowed(Body):
    def _update_causal_mask(self, attention_mask, input_tensor):
        mask = super()._update_causal_mask(attention_mask, input_tensor)
        return mask + torch.full_like(mask, torch.finfo(mask.dtype).min / 4).tril(-3)


class Capped(Model):
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, cache_position=None,
    ):  # fmt: skip
        out = super().forward(input_ids, attention_mask, labels=labels)
        return Output(out.loss, out.logits.tanh() * 5)


class Weighted(Model):
    def forward(self, input_ids=None, weights=None, **rest):
        return super().forward(input_ids, **rest)


OTHERS = {
    "mask": ("transformer", Windowed, "transformer", "not the causal one"),
    "logits": ("", Capped, "the model", "can't be tried alone"),
    "argument": ("", Weighted, "the model", r"its forward takes \(input_ids, weights, rest\)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_computes_something_else_is_left(case):
    place, kind, path, reason = OTHERS[case]
    eager, fast = remote_code(), remote_code()
    for model in (eager, fast):
        model.get_submodule(place).__class__ = kind
    left = dict(accelerate(fast).left)
    assert re.search(reason, left[path])
    with torch.inference_mode():
        close(fast(IDS).logits, eager(IDS).logits)


def test_names_copies_and_the_way_back():
    eager, fast = pair()
    assert type(fast).__name__ == "Model" and type(fast.transformer).__name__ == "Body"
    assert type(fast).__module__ == Model.__module__ and isinstance(fast, Model)
    with torch.inference_mode():
        expected = fast(IDS).logits
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(copied(IDS).logits, expected)
            # Its attentions go on asking its own body.
            assert copied.transformer._fused.masks is copied.transformer.layers[0].attn._fused.masks
            assert copied.transformer._fused.masks is not fast.transformer._fused.masks
    kept = fast.forward
    restore(fast)
    assert type(fast) is Model and type(fast.transformer) is Body
    with torch.inference_mode():
        close(kept(IDS).logits, eager(IDS).logits)


def test_the_head_and_loss_of_corenet(monkeypatch):
    eager, fast = corenet(), corenet()
    report = accelerate(fast, plan=Plan(STREAM, STREAM))
    assert report.accelerated["models"] == 1 and report.loss
    streamed = counted(monkeypatch, projections, "stream")
    ids = IDS % 256
    with torch.inference_mode():
        close(fast(ids), eager(ids))
        assert not streamed
        close(fast(ids[:1, :1]), eager(ids[:1, :1]))
        assert len(streamed) == 4 * len(fast.layers) + 1
    targets = ids.roll(-1, 1).index_fill(1, torch.tensor([8]), -1)
    logits = eager(ids)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected.backward()
    losses = counted(monkeypatch, ops, "linear_cross_entropy")
    loss = fast.loss(ids, targets, ignore_index=-1)
    loss.backward()
    close(loss, expected)
    assert len(losses) == 1
    for a, b in zip(fast.parameters(), eager.parameters(), strict=True):
        close(a.grad, b.grad)
    restore(fast)
    assert not hasattr(fast, "loss")
