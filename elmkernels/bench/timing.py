"""How long things take: interleaved baselines, the highest use of memory, and on what machine.

A sample calls a baseline often enough to be long beside the clock's resolution; the baselines take
turns round by round, in a rotated order, so that a machine that slows down slows all of them. On a
GPU a baseline is captured in a graph over rotated buffers, so that host time is left out and L2 is
cold; `calls` is the other figure there: what an eager call costs, host included.
"""

import ctypes
import gc
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import machine

Baseline = Callable[[], object] | Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of n samples, and where the middle 60% of them lie."""

    median: float
    p20: float
    p80: float
    n: int


def summary(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Timing(at(0.5), at(0.2), at(0.8), len(ordered))


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _calls_sample(fns: Sequence[Callable], device: torch.device) -> Callable[[int], float]:
    """Times `count` eager calls: on a CPU the work, on a GPU the slower of host and device."""

    def sample(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for i in range(count):
            fns[i % len(fns)]()
        synchronize(device)
        return (time.perf_counter() - start) / count

    return sample


def _graph_sample(fns: Sequence[Callable], device: torch.device) -> Callable[[int], float]:
    """Times `count` replays of a graph that calls every one of fns once: device time of a call."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for fn in (*fns[:1], *fns):  # twice for the first: compilers compile, pools fill
                fn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for fn in fns:
                fn()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(count: int) -> float:
        with torch.cuda.device(device):
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000 / count / len(fns)

    return sample


def _calibrate(sample: Callable[[int], float], warm_up: float, sample_time: float) -> int:
    """Warm up by time, then say how many calls make one sample long enough."""
    begin = time.perf_counter()
    count, cost = 1, sample(1)
    while time.perf_counter() - begin < warm_up:
        cost = sample(count)
        count = max(1, min(2 * count, int(sample_time / max(cost, 1e-9))))
    return max(1, round(sample_time / max(cost, 1e-9)))


def interleave(
    baselines: Mapping[str, Baseline],
    *,
    device: torch.device | str = "cpu",
    min_time: float = 0.2,
    rounds: int = 9,
    warm_up: float = 0.05,
    sample_time: float = 0.002,
    replay: bool = False,
) -> dict[str, Timing]:
    """{name: Timing} of baselines that take turns, for at least `rounds` rounds and `min_time` s
    each.

    A baseline is a function without arguments, or several that do the same on other buffers and are
    called in turn. replay: time CUDA graphs of them instead of eager calls.
    """
    device = torch.device(device)
    make_sample = _graph_sample if replay else _calls_sample
    lists = {name: [fns] if callable(fns) else list(fns) for name, fns in baselines.items()}
    samplers = {name: make_sample(fns, device) for name, fns in lists.items()}
    counts = {}
    for name, sample in samplers.items():
        per_sample = sample_time / len(lists[name]) if replay else sample_time
        counts[name] = _calibrate(sample, warm_up, per_sample)
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, turn = time.perf_counter(), 0
        while turn < rounds or time.perf_counter() - begin < min_time * len(names):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                samples[name].append(samplers[name](counts[name]))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def keep_pages() -> None:
    """Make the C library keep freed memory instead of returning it to the system, for the rest of
    the process. Above 32 MB glibc otherwise maps every output anew, and what is timed, of all
    baselines alike, is the system filling pages with zeros: several times the work itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def cache_bytes(device: torch.device | str = "cpu") -> int:
    """The last cache before memory, in bytes: a GPU's L2, a CPU's largest; 32 MiB if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 << 20)


def copies_beyond_cache(nbytes: int, device: torch.device | str, limit: int = 64) -> int:
    """How many sets of buffers of nbytes, used in turn, leave each one out of the cache."""
    return max(1, min(limit, 2 * cache_bytes(device) // max(1, nbytes) + 1))


def copies_of(nbytes: int, device: torch.device | str, count: int = 1) -> list[Callable]:
    """A copy that moves nbytes in all, read and written, as a baseline: the ceiling of memory."""
    half = max(1, nbytes // 8)
    pairs = [
        (torch.empty(half, device=device), torch.randn(half, device=device)) for _ in range(count)
    ]
    return [lambda to=to, data=data: to.copy_(data) for to, data in pairs]


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that a call needs at its highest, beyond what was there before it. On a CPU it is the
    resident set, watched every half millisecond: memory that the allocator kept from before
    counts for nothing, so measure in a fresh process, and calls long enough to be seen.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident()
    if before is None:
        raise RuntimeError("peak_memory on a CPU reads /proc/self/statm, which is not here")
    highest, done = before, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = fn()
        highest = max(highest, _resident())
        del result
    finally:
        done.set()
        watcher.join()
    return highest - before


def _resident() -> int | None:
    """Bytes of this process that lie in memory now."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return None
    return int(path.read_text().split()[1]) * resource.getpagesize()


def fingerprint(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure depends on: machine, versions, threads, commit and date."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": machine.load(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
    return found


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package is run from, if it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
