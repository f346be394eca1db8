"""Everything that a GPU can tell of this package in a few minutes, stage by stage.

On a CPU the same calls run in small form. Results are one dict of plain values; see
`gpu_check.stages` for what is kept when a stage fails or is stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .. import devices as gpu
from ..backends import build_report, choose, defined
from ..bench.machine import busy
from ..bench.timing import fingerprint
from . import gpu_facts as devices
from . import op_units
from .generation_units import generation_units
from .model_units import compiled_units, decode_units, model_units
from .models import GENERATION, Models
from .stages import FAILED, Clock, Found, Stage, Unit, run_stages

# In the order in which they tell most: is decoding right, how fast is it, and all the rest.
SHARES = {
    "machine": 2, "parity": 12, GENERATION: 13, "decode": 22, "compiled": 18, "ops": 14,
    "models": 9, "other-parity": 7, "sanitizer": 3,
}  # fmt: skip
STAGES = tuple(SHARES)


@dataclass(frozen=True)
class Check:
    """What to run: on which device, in how many seconds, in small form or not, which stages."""

    device: torch.device
    seconds: float
    quick: bool = False
    stages: tuple[str, ...] = STAGES
    seed: int = 0


def no_gpu() -> str:
    """What was found instead of a GPU, and what is needed."""
    return (
        f"{gpu.no_cuda()}; gpu-check needs an NVIDIA GPU of compute capability 8.0 or newer and a "
        "CUDA build of torch; `elmkernels gpu-check --device cpu --quick` is the rehearsal"
    )


def start(check: Check) -> Found:
    """The results before anything is done."""
    return {
        "complete": False,
        "command": "gpu-check",
        "device": str(check.device),
        "quick": check.quick,
        "seconds": check.seconds,
        "busy": busy(),
        "stages": {},
    }


def plan(check: Check, results: Found | None = None) -> list[Stage]:
    """The stages that were asked for, in their order. results: those that they fill."""
    device, quick = check.device, check.quick
    models = Models(device, quick, check.seed, {} if results is None else results)
    units: dict[str, tuple[Callable, bool]] = {
        "machine": (lambda: [Unit("facts", partial(_machine, device))], False),
        "parity": (lambda: op_units.parity_units(device, quick, first=True), True),
        GENERATION: (lambda: generation_units(models), False),
        "decode": (lambda: decode_units(models), False),
        "compiled": (lambda: compiled_units(models), False),
        "ops": (lambda: op_units.bench_units(device, quick), False),
        "models": (lambda: model_units(models), False),
        "other-parity": (lambda: op_units.parity_units(device, quick, first=False), True),
        "sanitizer": (lambda: op_units.sanitizer_units(device, quick), True),
    }
    return [Stage(n, SHARES[n], *units[n]) for n in STAGES if n in check.stages]


def steps(check: Check) -> int:
    """How often `run` says what comes next, where there is time for all of it."""
    return sum(1 + len(stage.units()) for stage in plan(check))


def run(
    check: Check,
    results: Found,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Fill `results`; raises `stages.DeadDevice` where only another process can go on."""
    lives = partial(devices.lives, check.device)
    run_stages(plan(check, results), results, Clock(check.seconds), say, keep, lives)


def passed(results: Found) -> bool:
    """Whether nothing that was run failed, in parity or otherwise."""
    units = [u for stage in results["stages"].values() for u in stage["units"].values()]
    return all(u["state"] != FAILED and u.get("ok", True) for u in units)


def _machine(device: torch.device, found: Found, clock: Clock) -> None:
    capability, built = gpu.capability(device), gpu.architectures()
    found |= fingerprint(device) | devices.facts(device)
    found["built"] = build_report()
    found["built_for"] = built
    found["backends"] = gpu.missing_backends(device)
    found["ops"] = {op: choose(op, device.type, None) for op in defined()}
    if capability is not None:
        found["covered"] = gpu.runs_on(capability, built) if built else None
