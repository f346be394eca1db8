"""What a device is: whether it is here, which backends fit it, what its maker promises.

Dispatch decides by the type of a device, once, at import. What a GPU is can't be asked there: that
initializes CUDA, after which a process can't fork. So it is asked where a model is accelerated, a
cache is made, and by the commands that report on a machine.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from .backends import (
    BACKENDS,
    BASES,
    COMPOSED,
    FEW,
    FEW_ROWS,
    REFERENCE,
    Reason,
    build_report,
    choose,
    defined,
    implements,
    preferred,
    traits,
    usable,
)

LEAST_CAPABILITY = (8, 0)  # bfloat16, and what Triton compiles for
_COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH in the driver's cuda.h


@dataclass(frozen=True)
class Datasheet:
    """What the maker promises: bytes a second, dense bfloat16 operations a second."""

    bandwidth: float
    bf16: float


# From the makers' data sheets, by the whole name that torch gives a GPU: cards that share a part of
# it differ (SXM, PCIe, NVL).
DATASHEETS: dict[str, Datasheet] = {
    "NVIDIA A10": Datasheet(0.600e12, 125e12),
    "NVIDIA A100-SXM4-40GB": Datasheet(1.555e12, 312e12),
    "NVIDIA A100-PCIE-40GB": Datasheet(1.555e12, 312e12),
    "NVIDIA A100-SXM4-80GB": Datasheet(2.039e12, 312e12),
    "NVIDIA A100 80GB PCIe": Datasheet(1.935e12, 312e12),
    "NVIDIA L4": Datasheet(0.300e12, 121e12),
    "NVIDIA L40": Datasheet(0.864e12, 181e12),
    "NVIDIA L40S": Datasheet(0.864e12, 362e12),
    "NVIDIA H100 80GB HBM3": Datasheet(3.35e12, 989e12),
    "NVIDIA H100 PCIe": Datasheet(2.0e12, 756e12),
    "NVIDIA H100 NVL": Datasheet(3.9e12, 835e12),
    "NVIDIA H200": Datasheet(4.8e12, 989e12),
    "NVIDIA H200 NVL": Datasheet(4.8e12, 835e12),
    "NVIDIA B200": Datasheet(8.0e12, 2250e12),
    "AMD Instinct MI300X": Datasheet(5.3e12, 1307e12),
}


def datasheet(name: str | None) -> Datasheet | None:
    """Of a GPU by its name; None if it isn't in the table, as a part of one (MIG) never is."""
    return DATASHEETS.get(name or "")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives to products on a type of device; None if it is off."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def missing_device(device: torch.device) -> Reason | None:
    """Why a device isn't here: what was found, what it needs and what works; None if it is here."""
    count = 1
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) < count:
        return None
    if count:
        return f"device {str(device)!r} is not here: torch sees {count} of {device.type}"
    return (
        f"device {str(device)!r} is not here: {no_cuda()}; it needs a GPU, its driver and a CUDA "
        "build of torch; device 'cpu' works"
    )


def free_memory() -> int | None:
    """Bytes that a process may still take of this machine's memory without swapping: what the
    system calls available, or what the process's own group has left of its limit. None if unknown.
    """
    free = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    group = next((x[3:] for x in _lines("/proc/self/cgroup") if x.startswith("0::")), None)
    for folder in () if group is None else ("/sys/fs/cgroup", f"/sys/fs/cgroup{group}"):
        most, used = (_number(f"{folder}/memory.{name}") for name in ("max", "current"))
        if most is not None and used is not None:
            cached = [x for x in _lines(f"{folder}/memory.stat") if x.startswith("inactive_file ")]
            free.append(most - used + sum(int(x.split()[1]) for x in cached))
    return max(0, min(free)) if free else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, ValueError):
        return []


def _number(path: str) -> int | None:
    """The number in a file; None if there is no file, or no limit."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def no_cuda() -> str:
    """What torch found if it sees no GPU."""
    built = "" if torch.version.cuda or torch.version.hip else " (this build of torch has no CUDA)"
    return f"torch {torch.__version__} sees no CUDA device{built}"


def check_here(device: torch.device) -> None:
    """Raise RuntimeError, with the reason, for a device that isn't here."""
    if missing := missing_device(device):
        raise RuntimeError(missing)


def architectures() -> list[str]:
    """Those that the CUDA library was built for ("80", "90+PTX"); none if that isn't known."""
    return [a.strip() for a in build_report().get("cuda architectures", "").split(",") if a.strip()]


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether one of the architectures runs on a GPU: the same major number and no newer minor, or
    with PTX any that is no newer.
    """
    for architecture in built:
        number, _, ptx = architecture.partition("+")
        least = int(number[:-1]), int(number[-1])
        if least <= capability and (ptx or least[0] == capability[0]):
            return True
    return False


def missing_on(backend: str, capability: tuple[int, int] | None, built: list[str]) -> Reason | None:
    """Why a backend that can run here can't run on a GPU of this compute capability.

    capability: None for a CPU. An unknown list of architectures is no reason; torch's own
    operations run wherever torch does.
    """
    if capability is None or backend in COMPOSED:
        return None
    found = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or newer, {found}"
    if backend == "cuda" and built and not runs_on(capability, built):
        return f"built for {', '.join(f'sm_{a}' for a in built)}, {found}"
    return None


def missing_backends(device: torch.device) -> dict[str, Reason | None]:
    """{backend: why it can't run on this very device, or None}."""
    found = {}
    seen, built = capability(device), architectures()
    for b in BACKENDS.values():
        other = None if device.type in b.devices else f"runs on {' or '.join(b.devices)}"
        found[b.name] = b.missing or other or missing_on(b.name, seen, built)
    return found


@dataclass(frozen=True)
class BackendChoice:
    """Which backend an op takes in a model on a device.

    Attributes:
        op: its name.
        named: what the op is given at every call; None leaves it to the call.
        resolved: what it then takes, in words: "cuda up to 16 rows, then triton".
        why: {backend: why it isn't taken}, of the one that was asked for and of those that the
            device's type prefers.

    Example:
        >>> BackendChoice("swiglu", None, "triton", {}).resolved
        'triton'
    """

    op: str
    named: str | None
    resolved: str
    why: dict[str, Reason]


def never_fall_back() -> tuple[str, ...]:
    """The ops whose backend, if it is named for a model, is that one or an error."""
    return tuple(op for op in defined() if not traits(op).falls_back)


def whole_model_backends() -> tuple[str, ...]:
    """The backends that may be named for a whole model: those with kernels for every op that never
    falls back, here or on another machine, and the reference.
    """
    return tuple(name for name in BACKENDS if all(_has(name, op) for op in never_fall_back()))


def _has(backend: str, op: str) -> bool:
    return backend == REFERENCE or implements(backend, op) or implements(BASES.get(backend, ""), op)


def backend_choices(device: torch.device, asked: str | None = None) -> dict[str, BackendChoice]:
    """Which backend each op takes in a model on a device.

    Args:
        device: what the model is on. Of a GPU its compute capability counts, not its type alone.
        asked: the backend that is asked for. An op that it has no kernels for takes the best other
            one, if it `falls_back`. None: the best of the device for each op.

    Returns:
        {op: its BackendChoice}, of all ops that have kernels.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the device isn't of a known type, or the backend can't run on it.

    Example:
        >>> backend_choices(torch.device("cpu"), "reference")["swiglu"].resolved
        'reference'
    """
    for op in never_fall_back():
        choose(op, device.type, asked)
    missing = missing_backends(device)
    if asked is not None and missing[asked]:
        works = ", ".join(repr(name) for name, reason in missing.items() if reason is None)
        raise RuntimeError(
            f"backend {asked!r} can't run on {device}: {missing[asked]}; what works there: {works}"
        )
    return {op: _choice(op, device.type, asked, missing) for op in defined()}


def _choice(
    op: str, kind: str, asked: str | None, missing: dict[str, Reason | None]
) -> BackendChoice:
    why = {}
    if asked is not None:
        if _has(asked, op):
            return BackendChoice(op, asked, _resolved(op, kind, choose(op, kind, asked)), why)
        why[asked] = f"it has no kernels for {op}"
    why |= {name: reason for name in preferred(op, kind) if (reason := missing[name])}
    # Dispatch knows the type of a device: it is overruled if it could take what this one can't run.
    names, named = usable(op, kind), None
    if any(missing[name] for name in names):
        named = next((name for name in names if missing[name] is None), REFERENCE)
    return BackendChoice(op, named, _resolved(op, kind, named), why)


def _resolved(op: str, kind: str, named: str | None) -> str:
    many = choose(op, kind, named)
    if not traits(op).by_rows or kind not in FEW:
        return many
    few = choose(op, kind, named, FEW[kind].order)
    return many if few == many else f"{few} up to {FEW_ROWS} rows, then {many}"


def cooperative(device: torch.device) -> bool | None:
    """Whether a GPU launches grids whose blocks wait for each other; None if nobody says."""
    index = torch.cuda.current_device() if device.index is None else device.index
    value, handle = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuDeviceGet(ctypes.byref(handle), index)
        failed |= driver.cuDeviceGetAttribute(ctypes.byref(value), _COOPERATIVE_LAUNCH, handle)
    except (OSError, AttributeError):
        return None
    return None if failed else bool(value.value)


def gpus() -> list[dict]:
    """Every CUDA device that torch sees: its name, capability, memory, and which backends fit."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", i)
        p = torch.cuda.get_device_properties(device)
        missing = missing_backends(device)
        found.append(
            {
                "device": str(device),
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory": p.total_memory,
                "backends": {n: why for n, why in missing.items() if "cuda" in BACKENDS[n].devices},
            }
        )
    return found
