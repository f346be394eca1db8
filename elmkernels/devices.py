"""Which of our backends fit a GPU, and why another doesn't: asked outside of dispatch.

Dispatch decides by the type of a device, once, at import. What a GPU is can't be asked there: that
initializes CUDA, after which a process can't fork. So it is asked where a model is accelerated, a
cache is made, and by the commands that report on a machine.
"""

import ctypes

import torch

from .backends import BACKENDS, COMPOSED, REFERENCE, build_report, usable

LEAST_CAPABILITY = (8, 0)  # bfloat16, and what Triton compiles for
_COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH in the driver's cuda.h


def absent(device: torch.device) -> str | None:
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


def no_cuda() -> str:
    """What torch found where it sees no GPU."""
    built = "" if torch.version.cuda or torch.version.hip else " (this build of torch has no CUDA)"
    return f"torch {torch.__version__} sees no CUDA device{built}"


def check_here(device: torch.device) -> None:
    """Raise RuntimeError, with the reason, for a device that isn't here."""
    if why := absent(device):
        raise RuntimeError(why)


def architectures() -> list[str]:
    """Those that the CUDA library was built for ("80", "90+PTX"); none where that isn't known."""
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


def unfit(backend: str, capability: tuple[int, int] | None, built: list[str]) -> str | None:
    """Why a backend that can run here can't run on a GPU of this compute capability, or None.
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


def backends_of(device: torch.device) -> dict[str, str | None]:
    """{backend: None, or why it can't run on this device}."""
    found = {}
    seen, built = capability(device), architectures()
    for b in BACKENDS.values():
        other = None if device.type in b.devices else f"runs on {' or '.join(b.devices)}"
        found[b.name] = b.missing or other or unfit(b.name, seen, built)
    return found


def working(fit: dict[str, str | None]) -> str:
    """The backends that work, by `backends_of`, to end an error with."""
    return "what works there: " + ", ".join(repr(name) for name, why in fit.items() if why is None)


def check_backend(name: str, device: torch.device) -> None:
    """Raise RuntimeError, with the reason, for a backend that can't run on this very device."""
    fit = backends_of(device)
    if fit.get(name):
        raise RuntimeError(f"backend {name!r} can't run on {device}: {fit[name]}; {working(fit)}")


def narrowed(op: str, fit: dict[str, str | None], kind: str) -> str | None:
    """The backend that an op must be given on a device: None where any that dispatch may take on
    that type of device works on this very one, else the first that does. fit: see `backends_of`.
    """
    names = usable(op, kind)
    if all(fit[name] is None for name in names):
        return None
    return next((name for name in names if fit[name] is None), REFERENCE)


def cooperative(device: torch.device) -> bool | None:
    """Whether a GPU launches grids whose blocks wait for each other; None where nobody says."""
    index = torch.cuda.current_device() if device.index is None else device.index
    value, handle = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuDeviceGet(ctypes.byref(handle), index)
        failed |= driver.cuDeviceGetAttribute(ctypes.byref(value), _COOPERATIVE_LAUNCH, handle)
    except (OSError, AttributeError):
        return None
    return None if failed else bool(value.value)


def described() -> list[dict]:
    """Every CUDA device that torch sees: its name, capability, memory, and which backends fit."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", i)
        p = torch.cuda.get_device_properties(device)
        fit = {n: why for n, why in backends_of(device).items() if "cuda" in BACKENDS[n].devices}
        found.append(
            {
                "device": str(device),
                "name": p.name,
                "capability": ".".join(map(str, capability(device))),
                "memory": p.total_memory,
                "backends": fit,
            }
        )
    return found
