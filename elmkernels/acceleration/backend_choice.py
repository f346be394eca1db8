"""Which backend the modules of a accelerated model are given, by what its very device can run."""

import torch

from .. import devices
from ..backends import COMPOSED, PREFERENCE, choose, implements, where_it_has

OPS = ("rms_norm", "add_rms_norm", "qk_norm_rope", "swiglu")
ALL_OPS = (*OPS, "attention", "linear", "linear_cross_entropy")


def given_backends(
    device: torch.device, asked: str | None
) -> tuple[dict[str, str | None], list[str]]:
    """What each op's modules are given as their backend (None: the best of the device's type at
    every call), and which backends can't run on this very device, why and what is taken instead.
    Raises ValueError for an unknown backend, RuntimeError for one that is asked for and can't run.
    """
    kind = device.type
    if asked is not None:
        for op in OPS:
            choose(op, kind, asked)
        if kind == "cuda":
            devices.check_backend(asked, device)
        given = {op: where_it_has(op, asked) for op in ("attention", "linear_cross_entropy")}
        return dict.fromkeys(ALL_OPS, asked) | given, []
    if kind != "cuda":
        return dict.fromkeys(ALL_OPS), []
    fit = devices.backends_of(device)
    given = {op: devices.narrowed(op, fit, kind) for op in ALL_OPS}
    lines = []
    for name in PREFERENCE[kind]:
        if name in COMPOSED or not (why := fit[name]):
            continue
        instead: dict[str, list[str]] = {}
        for op in ALL_OPS:
            if implements(name, op):
                instead.setdefault(given[op] or choose(op, kind, None), []).append(op)
        taken = "; ".join(f"{other} for {', '.join(ops)}" for other, ops in instead.items())
        lines.append(f"{name} can't run on {device}: {why}; taken instead: {taken}")
    if any(given.values()):
        lines.append("accelerate again where the model moves to another device")
    return given, lines
