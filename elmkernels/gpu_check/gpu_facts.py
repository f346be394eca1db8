"""GPU facts: properties, datasheet peaks, and a liveness check."""

import shutil
import subprocess
from typing import Any

import torch

from ..devices import datasheet

SMI_FIELDS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "mig.mode.current",
)  # fmt: skip


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def facts(device: torch.device) -> dict[str, Any]:
    """Of a GPU: memory, processors, caches, driver and clocks, as far as they can be read."""
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
