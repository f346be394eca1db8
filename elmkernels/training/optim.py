"""The optimizer and its learning rate.

    w <- w - lr (m / (sqrt(v) + eps) + weight_decay w)    (AdamW; m and v corrected for their bias)

Matrices and the embedding decay, 1-D parameters (norms) don't. The rate is CoreNet's cosine rule.
"""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from .. import checks
from .recipe import Recipe, Schedule

# Where torch's fused AdamW runs.
_FUSED = ("cpu", "cuda", "mps", "xpu")


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters that decay and those that don't, in the model's order; no empty group.

    A tied parameter appears once, frozen ones not at all. Raises ValueError if nothing is left.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model must have parameters that require gradients, all are frozen")
    decay = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() <= 1]
    both = [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in both if group["params"]]


def build(model: nn.Module, recipe: Recipe, fused: bool = True) -> AdamW:
    """AdamW as the recipe says, at the rate of step 0.

    fused: torch's one-kernel update, where the parameters' device has it.
    """
    settings = recipe.optimizer
    parameters = groups(model, settings.weight_decay)
    fused = fused and all(
        p.device.type in _FUSED and p.is_floating_point() for g in parameters for p in g["params"]
    )
    return AdamW(
        parameters,
        lr=learning_rate(recipe.schedule, 0),
        betas=settings.betas,
        eps=settings.eps,
        fused=fused,
    )


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate of update number `step`; a run makes the updates 0 .. steps - 1.

    Update 0 has warmup_init_lr. From there it rises by the same amount at each step, and update
    number warmup_steps has max_lr exactly. Then half a cosine over steps - warmup_steps + 1 steps:
    it would be at min_lr in update steps + 1, and in the last two before that the cosine is so flat
    that update steps - 1 is above min_lr by about (pi / (steps - warmup_steps))^2 (max_lr -
    min_lr). These are CoreNet's numbers, before it rounds them to eight decimals. Later steps stay
    at min_lr. Raises ValueError for a negative step.
    """
    if step < 0:
        checks.fail("step", "0 or more", step)
    if step < schedule.warmup_steps:
        rise = (schedule.max_lr - schedule.warmup_init_lr) / schedule.warmup_steps
        return schedule.warmup_init_lr + step * rise
    period = schedule.steps - schedule.warmup_steps + 1
    done = min((step - schedule.warmup_steps) / period, 1.0)
    half = 0.5 * (schedule.max_lr - schedule.min_lr)
    return schedule.min_lr + half * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group the rate; a rate that is a tensor (captured graphs) changes in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
