"""Tokens of whole models as units of a check: by the accelerated model and by each decode mode.

Each mode has a unit of its own, so that one that hangs takes nothing else with it.
"""

from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..acceleration.decode_modes import GRAPH, ONE_LAUNCH
from ..acceleration.decoder_weights import decoder_weights_of
from ..backends import REFERENCE, choose
from ..bench.runners import Task
from ..generation.step import greedy
from ..openelm.cache import KVCache
from ..testing.model_parity import ModelParity, check_model, compare_tokens
from .models import LIMIT, MODE_LIMIT, Models
from .runners import DecoderRunner
from .stages import Clock, Found, LeftOut, Unit

BATCH, PROMPT = 2, 48
EXACT_STEPS = 16  # whose logits are compared bit for bit


def generation_units(models: Models) -> list[Unit]:
    """Accelerated models held to the reference, with gradients, then their tokens by each mode. The
    model that decoding is measured with first comes last.
    """
    names, found = models.sizes.models, []
    pairs = [(name, dtype) for name in names for dtype in (torch.float32, torch.bfloat16)]
    for name, dtype in pairs:
        what = f"{name} {str(dtype).removeprefix('torch.')}"
        found.append(Unit(what, partial(_accelerated, models, name, dtype), LIMIT))
        for mode in (GRAPH, ONE_LAUNCH):
            run = partial(_by_way, models, name, dtype, mode)
            found.append(Unit(f"{what} {mode}", run, MODE_LIMIT))
        if dtype == torch.bfloat16:
            found.append(Unit(f"{what} packed", partial(_packed, models, name), LIMIT))
    return found


def _steps(models: Models, name: str) -> int:
    """Of the smallest model most; each costs hundreds of launches more in a larger one."""
    compared = models.sizes.compared
    return compared if name == models.sizes.models[0] else compared // 4


def _prompts(models: Models, name: str) -> Tensor:
    return models.tokens(models.config(name), BATCH, PROMPT)


def _check(models: Models, name: str, dtype: torch.dtype, steps: int) -> ModelParity:
    eager, accelerated, report = models.get(name, dtype)
    return check_model(eager, accelerated, _prompts(models, name), steps, report.gemm)


def _accelerated(models: Models, name: str, dtype: torch.dtype, found: Found, clock: Clock) -> None:
    report = models.get(name, dtype)[2]
    found |= {"ok": False, "backends": report.backends | {"attention": report.attention}}
    found |= {"fallbacks": report.fallbacks, "modes": report.decode_modes}
    found["decode_step"] = choose("decode_step", models.device.type, None)
    parity = _check(models, name, dtype, _steps(models, name))
    bad = [row for row in parity.rows() if row["parity"] != "ok"]
    found["parity"] = {"ok": parity.ok, "rule": parity.rule, "truth": parity.truth}
    found["parity"] |= {"failed": bad, "losses": parity.losses, "greedy": asdict(parity.greedy)}
    models.allowed[name, dtype] = parity.greedy.gap_allowed
    found["ok"] = parity.ok


def _by_way(
    models: Models, name: str, dtype: torch.dtype, mode: str, found: Found, clock: Clock
) -> None:
    """Greedy tokens, held to the reference's up to a tie."""
    eager, accelerated, _ = models.get(name, dtype)
    _need(models, mode, accelerated)
    found["ok"] = False
    ids, steps = _prompts(models, name), _steps(models, name)
    if (name, dtype) not in models.allowed:  # another process has compared the logits
        models.allowed[name, dtype] = _check(models, name, dtype, 1).greedy.gap_allowed
    captured = models.device.type == "cuda"
    run = DecoderRunner(mode, accelerated, mode, captured).run(Task("", ids, steps - 1))
    got = torch.tensor(run(), device=ids.device)
    same = compare_tokens(eager, ids, greedy(eager, ids, steps), got, models.allowed[name, dtype])
    found |= {"mode": mode, "captured": captured, "tokens": asdict(same), "ok": same.ok}


def _need(models: Models, mode: str, accelerated: object) -> None:
    """Raise LeftOut where a model can't be decoded in a mode here."""
    if why := models.missing(mode, accelerated, trial=True):
        raise LeftOut(why)
    if mode == ONE_LAUNCH and choose("decode_step", models.device.type, None) == REFERENCE:
        raise LeftOut("decode_step has no kernel here")


@torch.inference_mode()
def _packed(models: Models, name: str, found: Found, clock: Clock) -> None:
    """The logits of a step by packed12 weights and by plain ones, which must be the same bits."""
    eager, accelerated, _ = models.get(name, torch.bfloat16)
    _need(models, ONE_LAUNCH, accelerated)
    found |= {"ok": False, "steps": EXACT_STEPS, "equal": 0}
    ids = _prompts(models, name)
    plain, packed = (
        decoder_weights_of(accelerated),
        decoder_weights_of(models.compressed(name, "packed12")),
    )
    room, where = ids.shape[1] + EXACT_STEPS, {"dtype": torch.bfloat16, "device": ids.device}
    one, other = (KVCache(eager.config, ids.shape[0], room, **where) for _ in range(2))
    tokens = accelerated(ids, cache=one, logits_to_keep=1)[:, -1].argmax(-1)
    other.arena.data.copy_(one.arena.data)
    positions = torch.full_like(tokens, ids.shape[1])
    for _ in range(EXACT_STEPS):
        logits = ops.decode_step(plain, tokens, positions, one.arena)
        if not torch.equal(logits, ops.decode_step(packed, tokens, positions, other.arena)):
            return
        found["equal"] += 1
        tokens, positions = logits.argmax(-1), positions + 1
    found["ok"] = True
