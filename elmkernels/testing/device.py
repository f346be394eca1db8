"""What a GPU is: facts, what its maker promises, and which of our backends fit it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from ..backends import BACKENDS, build_report

LEAST_CAPABILITY = (8, 0)  # bfloat16, and what Triton compiles for
SMI_FIELDS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "mig.mode.current",
)  # fmt: skip


@dataclass(frozen=True)
class Datasheet:
    """What the maker promises: bytes a second, dense bfloat16 operations a second."""

    bandwidth: float
    bf16: float


# By what torch calls them; the PCIe and NVL cards of the same names are slower.
DATASHEETS = {
    r"A100-SXM\d*-80GB": Datasheet(2.039e12, 312e12),
    r"H100 80GB HBM3": Datasheet(3.35e12, 989e12),
    r"H200(?! NVL)": Datasheet(4.8e12, 989e12),
    r"(?<!G)B200": Datasheet(8.0e12, 2250e12),
}


def datasheet(name: str | None) -> Datasheet | None:
    """Of a GPU by its name; None for one that isn't in the table, or for a part of one (MIG)."""
    if name is None or "MIG" in name:
        return None
    return next((d for pattern, d in DATASHEETS.items() if re.search(pattern, name)), None)


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def facts(device: torch.device) -> dict[str, Any]:
    """Memory and, of a GPU, its processors, caches, driver and clocks as far as they can be had."""
    if device.type != "cuda":
        return {}
    p = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    promised = datasheet(p.name)
    return {
        "memory": {"total": total, "free": free},
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "datasheet": None if promised is None else vars(promised),
        "nvidia-smi": nvidia_smi(device.index or 0),
    }


def nvidia_smi(index: int) -> dict[str, str] | str:
    """Fields by name, or why there are none. It numbers the GPUs of the machine, which are those
    that torch sees unless some are hidden.
    """
    path = shutil.which("nvidia-smi")
    if path is None:
        return "nvidia-smi is not on PATH"
    query = [path, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", f"-i={index}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi can't be run: {error}"
    if done.returncode:
        return f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:200]}"
    return dict(zip(SMI_FIELDS, (x.strip() for x in done.stdout.split(",")), strict=False))


def architectures() -> list[str]:
    """Those that the CUDA library was built for ("80", "90"); none where that isn't known."""
    return [a.strip() for a in build_report().get("cuda architectures", "").split(",") if a.strip()]


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether one of the architectures runs on a GPU: the same major number, no newer minor."""
    pairs = [(int(a[:-1]), int(a[-1])) for a in built]
    return any(major == capability[0] and minor <= capability[1] for major, minor in pairs)


def unfit(backend: str, capability: tuple[int, int] | None, built: list[str]) -> str | None:
    """Why a backend that can run here can't run on a GPU of this compute capability, or None.
    capability: None for a CPU. An unknown list of architectures is no reason.
    """
    if capability is None:
        return None
    found = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or newer, {found}"
    if backend == "cuda" and built and not runs_on(capability, built):
        return f"built for {', '.join(f'sm_{a}' for a in built)}, {found}"
    return None


def capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def backends_of(device: torch.device) -> dict[str, str | None]:
    """{backend: None, or why it can't run on this device}."""
    found = {}
    for b in BACKENDS.values():
        other = None if device.type in b.devices else f"runs on {' or '.join(b.devices)}"
        found[b.name] = b.missing or other or unfit(b.name, capability(device), architectures())
    return found


def lives(device: torch.device) -> bool:
    """Whether a device still works in this process: an illegal access breaks it for good."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(8, device=device).sum().item() == 8)
    except RuntimeError:
        return False
