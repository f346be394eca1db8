"""Everything that a GPU can tell of this package in a few minutes, stage by stage.

On a CPU the same calls run in small form. `stages` says what is kept when a stage fails or is
stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import devices
from ..backends import build_report, choose, defined
from ..bench.benchmark import Benchmark, Report, Results
from ..bench.timing import fingerprint
from . import gpu_facts, op_units
from .generation_units import generation_units
from .model_units import compiled_units, decode_units, model_units
from .models import GENERATION, Models
from .report import draw, summary
from .stages import FAILED, Clock, Stage, Unit, run_stages

# In the order in which they tell most: is decoding right, how fast is it, and all the rest.
SHARES = {
    "machine": 2, "parity": 12, GENERATION: 13, "decode": 22, "compiled": 18, "ops": 14,
    "models": 9, "other-parity": 7, "sanitizer": 3,
}  # fmt: skip
STAGES = tuple(SHARES)


@dataclass(frozen=True, kw_only=True)
class GpuCheck(Benchmark):
    """On which device, in how many seconds, in small form or not, which stages."""

    device: torch.device
    seconds: float
    quick: bool = False
    wanted: tuple[str, ...] = STAGES
    seed: int = 0

    @property
    def stages(self) -> int:
        return sum(1 + len(stage.units()) for stage in self.plan())

    def describe(self) -> Results:
        return {
            "command": "gpu-check",
            "device": str(self.device),
            "quick": self.quick,
            "seconds": self.seconds,
            "stages": {},
        }

    def measure(self, results: Results, report: Report) -> None:
        """Raises `stages.DeadDevice` if only another process can go on."""
        lives = partial(gpu_facts.lives, self.device)
        run_stages(self.plan(results), results, Clock(self.seconds), report, lives)

    def passed(self, results: Results) -> bool:
        """Whether nothing that was run failed, in parity or otherwise."""
        units = [u for stage in results["stages"].values() for u in stage["units"].values()]
        return all(u["state"] != FAILED and u.get("ok", True) for u in units)

    def summary(self, results: Results) -> str:
        return summary(results)

    def chart(self, results: Results, folder: Path) -> list[str]:
        return draw(results, folder)

    def plan(self, results: Results | None = None) -> list[Stage]:
        """The stages that were asked for, in their order. results: those that they fill."""
        device, quick = self.device, self.quick
        models = Models(device, quick, self.seed, {} if results is None else results)
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
        return [Stage(n, SHARES[n], *units[n]) for n in STAGES if n in self.wanted]


def no_gpu() -> str:
    """What was found instead of a GPU, and what is needed."""
    return (
        f"{devices.no_cuda()}; gpu-check needs an NVIDIA GPU of compute capability 8.0 or newer "
        "and a CUDA build of torch; the rehearsal is "
        "`elmkernels gpu-check --device cpu --quick --out DIR`"
    )


def _machine(device: torch.device, found: Results, clock: Clock) -> None:
    capability, built = devices.capability(device), devices.architectures()
    found |= fingerprint(device) | gpu_facts.facts(device)
    found["built"] = build_report()
    found["built_for"] = built
    found["backends"] = devices.missing_backends(device)
    found["ops"] = {op: choose(op, device.type, None) for op in defined()}
    if capability is not None:
        found["covered"] = devices.runs_on(capability, built) if built else None
