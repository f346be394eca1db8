"""What `accelerate` did, as data and as lines of text."""

from dataclasses import dataclass, field

import torch

from ..backends import PREFERENCE, Reason, traits
from ..devices import BackendChoice
from ..ops.linear import MAX_ROWS
from .routines import SEVERAL_ROWS, Plan


@dataclass
class Report:
    """What `accelerate` did: one line a fact as text, and the same as data.

    Attributes:
        convention: the family of models that this one belongs to.
        backends: {op: the backend it takes, in words}, of norms, rotation and SwiGLU.
        accelerated: {kind of module: how many have a fused class}.
        left: (path, reason) of modules that stayed as they were, or that are called where a
            shortcut would go past them.
        gemm: the routines of the projections.
        prepacked_bytes: memory that prepacked copies of the weights may take, beside them.
        attention: what runs: its backend, the preferred one if the named one lacks it; torch's
            where the model gives every step a mask.
        loss: the same of linear_cross_entropy; empty if the model has no `loss`.
        missing: why no op of the model has a kernel on its device, and what mends it; None if one
            has, or if the reference was asked for.
        fallbacks: which backends this very GPU can't run, and what is taken instead.
        decode_modes: {mode: why not, or None}, of decoding on a GPU: see `decode_modes.modes_of`.
        wrapped: {class of what projections are inside of, such as an adapter's: how many}. It is
            called, with the routine of `gemm` inside; norms, rotation, SwiGLU and loss stay fused.
        notes: what else is worth knowing.

    Example:
        >>> report = elmkernels.accelerate(model)
        >>> report.accelerated["layers"]
        2
    """

    convention: str
    backends: dict[str, str]
    accelerated: dict[str, int]
    left: list[tuple[str, Reason]]
    gemm: Plan
    prepacked_bytes: int = 0
    attention: str = ""
    loss: str = ""
    missing: Reason | None = None
    fallbacks: list[str] = field(default_factory=list)
    decode_modes: dict[str, Reason | None] = field(default_factory=dict)
    wrapped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.accelerated.items())
        backends = ", ".join(f"{op}: {name}" for op, name in self.backends.items())
        gemm = (
            f"1 row {self.gemm.one_row}, up to {MAX_ROWS} {self.gemm.of_rows(MAX_ROWS)}, "
            f"up to {SEVERAL_ROWS} {self.gemm.of_rows(SEVERAL_ROWS)}, "
            f"more {self.gemm.many_rows}, training {self.gemm.training}"
        )
        lines = [
            f"accelerated ({self.convention} model): {kinds}",
            f"backends: {backends}, attention: {self.attention}"
            + (f", linear_cross_entropy: {self.loss}" if self.loss else ""),
            f"projections: {gemm}",
        ]
        if self.missing:
            lines.insert(0, self.missing)
        if self.prepacked_bytes:
            lines.append(
                f"prepacked weights: up to {self.prepacked_bytes / 2**20:.0f} MiB more memory"
            )
        lines += self.fallbacks
        if self.decode_modes:
            possible = [mode for mode, reason in self.decode_modes.items() if reason is None]
            lines.append(f"decoding: by {' or '.join(possible) or 'calls alone'}")
            lines += [
                f"not by {mode}: {reason}" for mode, reason in self.decode_modes.items() if reason
            ]
        lines += [f"left {path}: {reason}" for path, reason in self.left]
        lines += [
            f"{n} projections inside of {kind} are called through it; norms, rotation, SwiGLU and "
            "loss stay fused, a step of decoding calls the layers"
            for kind, n in self.wrapped.items()
        ]
        return "\n".join(lines + self.notes)


def alone_note(held: list[int]) -> str:
    """held: bytes of each weight that is held prepacked alone, 0 of one that stays dense."""
    found = [nbytes for nbytes in held if nbytes]
    return (
        f"{len(found)} of {len(held)} projections hold their weight prepacked alone, "
        f"{sum(found) / 2**20:.0f} MiB: who asks for one gets it dense, with the same bits"
    )


def fallbacks(device: torch.device, choices: dict[str, BackendChoice]) -> list[str]:
    """Which backends a GPU can't run, why, and what each op that has them takes instead."""
    # How a model is decoded is told by its decode modes.
    choices = {op: choice for op, choice in choices.items() if not traits(op).whole_model}
    lines = []
    for name in PREFERENCE[device.type]:
        instead: dict[str, list[str]] = {}
        for op, choice in choices.items():
            if name in choice.why:
                instead.setdefault(choice.resolved, []).append(op)
        if instead:
            why = next(choice.why[name] for choice in choices.values() if name in choice.why)
            taken = "; ".join(f"{other} for {', '.join(ops)}" for other, ops in instead.items())
            lines.append(f"{name} can't run on {device}: {why}; taken instead: {taken}")
    if any(choice.named for choice in choices.values()):
        lines.append("accelerate again if the model moves to another device")
    return lines
