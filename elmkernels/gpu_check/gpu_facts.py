"""What a GPU is: facts, what its maker promises, and whether it still works."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

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


def lives(device: torch.device) -> bool:
    """Whether a device still works in this process: an illegal access breaks it for good."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(8, device=device).sum().item() == 8)
    except RuntimeError:
        return False
