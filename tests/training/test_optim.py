"""Which parameters decay, and the learning rate at each step."""

import math

import pytest
import torch
from helpers.corpora import recipe

from elmkernels.openelm import OpenELM
from elmkernels.training import optim
from elmkernels.training.recipe import Optimizer, Recipe, Schedule, model_config


def corenet_rate(step: int, schedule: Schedule) -> float:
    """CoreNet's cosine scheduler: iteration, then the period from the end of the warm-up."""
    warmup, top, low = schedule.warmup_steps, schedule.max_lr, schedule.min_lr
    if step < warmup:
        return schedule.warmup_init_lr + step * ((top - schedule.warmup_init_lr) / warmup)
    turn = math.pi * (step - warmup) / (schedule.steps - warmup + 1)
    return max(0.0, low + 0.5 * (top - low) * (1 + math.cos(turn)))


@pytest.mark.parametrize(
    "schedule",
    [Schedule(), Schedule(200, 3e-3, 3e-4, 20, 1e-6), Schedule(10, 1e-3, 0.0, 0, 1e-6)],
)
def test_the_rate_is_corenet_s(schedule):
    steps = {0, 1, schedule.warmup_steps, schedule.steps // 2, schedule.steps - 1, schedule.steps}
    for step in steps | set(range(0, schedule.steps, max(1, schedule.steps // 50))):
        rate = optim.learning_rate(schedule, step)
        assert rate == pytest.approx(corenet_rate(step, schedule), rel=1e-12)


def test_the_rate_s_landmarks():
    schedule = Schedule()
    assert optim.learning_rate(schedule, 0) == 1e-6
    assert optim.learning_rate(schedule, 2500) == pytest.approx((1e-6 + 5.3e-3) / 2)
    assert optim.learning_rate(schedule, 5000) == 5.3e-3
    assert round(optim.learning_rate(schedule, 349_999), 8) == 5.3e-4
    assert optim.learning_rate(schedule, 350_001) == optim.learning_rate(schedule, 10**9) == 5.3e-4
    no_warmup = Schedule(steps=10, warmup_steps=0)
    assert optim.learning_rate(no_warmup, 0) == no_warmup.max_lr
    only_warmup = Schedule(steps=10, warmup_steps=10)
    assert optim.learning_rate(only_warmup, 9) < optim.learning_rate(only_warmup, 10)
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        optim.learning_rate(schedule, -1)


def test_matrices_decay_and_norms_don_t():
    model = OpenELM(model_config(recipe()))
    optimizer = optim.build(model, Recipe())
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("norm.weight") for p in rest["params"])
    assert not any("norm" in names[id(p)] for p in decay["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-6}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        ((0.9, 0.95), 1e-8)
    }


def test_tied_parameters_come_once_and_frozen_ones_not():
    shared = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Linear(4, 4), "c": torch.nn.Module()})
    model["c"].weight = shared.weight
    model["b"].weight.requires_grad_(False)
    decay, rest = optim.groups(model, 0.5)
    assert [id(p) for p in decay["params"]] == [id(shared.weight)]
    assert [id(p) for p in rest["params"]] == [id(model["b"].bias)]
    model["b"].bias.requires_grad_(False)
    assert len(optim.groups(model, 0.5)) == 1
    with pytest.raises(ValueError, match="all are frozen"):
        optim.groups(model.requires_grad_(False), 0.5)


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_is_adamw_s(fused):
    model = torch.nn.Linear(3, 2).double()
    settings = Recipe(
        optimizer=Optimizer(weight_decay=0.5), schedule=Schedule(10, 0.1, 0.0, warmup_steps=0)
    )
    optimizer = optim.build(model, settings, fused=fused)
    before = [p.detach().clone() for p in model.parameters()]
    optim.set_learning_rate(optimizer, 0.2)
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    # The first update is the gradient's sign (both moments are their bias corrections' inverse).
    for p, old, decay in zip(model.parameters(), before, (0.5, 0.0), strict=True):
        torch.testing.assert_close(p, old - 0.2 * decay * old - 0.2)


def test_a_rate_that_is_a_tensor_changes_in_place():
    optimizer = torch.optim.AdamW([torch.ones(2, requires_grad=True)], lr=torch.tensor(1.0))
    kept = optimizer.param_groups[0]["lr"]
    optim.set_learning_rate(optimizer, 0.25)
    assert kept.item() == 0.25
