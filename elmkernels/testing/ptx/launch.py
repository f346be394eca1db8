"""Launches of Triton's kernels, taken from the launchers themselves and executed.

A driver stands in for CUDA's: Triton binds and specializes the arguments, compiles for sm_80 and
launches as it would on a GPU, up to the binary, which is left out. What arrives at the launch, the
grid and the arguments, is executed from the PTX on the bytes of the tensors, which lie on the CPU.
The public ops run up to there too: checks, autograd and launchers are those that a GPU gets.
"""

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import backends
from .faults import PtxError
from .memory import THERE, WRITTEN, Tensors
from .program import Program
from .run import execute
from .source import parse
from .state import Launch, Settings
from .traffic import Traffic

ARCH, WARP = 80, 32
CTYPES = {
    "i1": "i1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u1": "u1", "u8": "u1",
    "u16": "u2", "u32": "u4", "u64": "u8", "fp32": "f4", "f32": "f4", "fp64": "f8",
}  # fmt: skip


@dataclass
class Executed:
    """One launch that was executed.

    Attributes:
        kernel: its name, with its module's.
        grid: of blocks.
        threads: in a block.
        traffic: what it moved, if that was counted.
        tensors: of it, the sectors that accesses touch of each tensor, and how many different;
            tensors of one storage are together.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    traffic: Traffic | None
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Device:
    """The GPU that isn't there: how launches are executed, and those that were.

    Attributes:
        settings: of every execution.
        launches: those so far.
        multiprocessors: that it seems to have; few make persistent programs loop at small sizes.
        rewrite: changes the PTX text before it is executed, as mutations do.
        launching: whether a launcher runs, whose memory is known from when it is made.
    """

    settings: Settings = field(default_factory=Settings)
    launches: list[Executed] = field(default_factory=list)
    multiprocessors: int = 4
    rewrite: Callable[[str], str] | None = None
    launching: bool = False
    _programs: dict[tuple[str, str], Program] = field(default_factory=dict, repr=False)
    _fresh: dict[int, tuple[Any, np.ndarray]] = field(default_factory=dict, repr=False)

    def launch(self, ptx: str, name: str, shape: tuple, shared: int, arguments: dict) -> None:
        """Execute a kernel.

        Args:
            ptx: its text.
            name: the kernel's in there.
            shape: (grid, threads in a block, what to call it).
            shared: bytes of dynamic shared memory.
            arguments: {name: (type, value)} of the parameters; tensors for pointers.
        """
        grid, threads, label = shape
        text = self.rewrite(ptx) if self.rewrite else ptx
        if (text, name) not in self._programs:
            self._programs[text, name] = Program(parse(text), name, self.settings.share)
        program = self._programs[text, name]
        memory, pointers, storages = self._memory([v for _, v in arguments.values()])
        params = bytearray(program.param_bytes)
        variables = program.function.params
        if len(variables) < len(arguments):
            raise PtxError(f"{name} has {len(variables)} parameters, got {len(arguments)}")
        for i, (kind, value) in enumerate(arguments.values()):
            raw = np.uint64(pointers[i]) if kind[0] == "*" else np.dtype(CTYPES[kind]).type(value)
            where = variables[i].offset
            params[where : where + raw.nbytes] = raw.tobytes()
        block = (program.function.threads or threads, 1, 1)
        launch = Launch(grid, block, shared, bytes(params), memory, self.settings)
        traffic = execute(program, launch)
        done = Executed(label, grid, launch.threads, traffic)
        if traffic is not None:
            for at, region in enumerate(memory.regions):
                of = [n for n, (_, v) in arguments.items() if _is_of(v, storages[at])]
                done.tensors[" ".join(of)] = traffic.of(region.begin, region.size)
        self.launches.append(done)
        for i, storage in enumerate(storages):
            data, marks = memory.data(i)
            _bytes_of(storage)[:] = data
            if storage.data_ptr() in self._fresh:
                written = self._fresh[storage.data_ptr()][1]
                written |= (marks & WRITTEN) != 0

    def _memory(self, values: list) -> tuple[Tensors, dict[int, int], list]:
        """The tensors' bytes, the address of each argument, and their storages. Of a storage only
        the bytes are there that an element of one of the tensors has."""
        storages: dict[int, Any] = {}
        there: dict[int, np.ndarray] = {}
        for t in values:
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key = storage.data_ptr()
            if key not in storages:
                storages[key], there[key] = storage, np.zeros(storage.nbytes(), bool)
            there[key] |= touched(t)
        found, names = [], {}
        for i, key in enumerate(storages):
            written = self._fresh[key][1] if key in self._fresh else True
            marks = (there[key] * THERE).astype(np.uint8) | np.where(written, WRITTEN, 0)
            names[key] = i
            found.append((f"tensor {i}", key, _bytes_of(storages[key]), marks.astype(np.uint8)))
        memory = Tensors(found)
        pointers = {
            i: memory.address(
                names[t.untyped_storage().data_ptr()], int(t.storage_offset()) * t.element_size()
            )
            for i, t in enumerate(values)
            if isinstance(t, Tensor)
        }
        return memory, pointers, list(storages.values())

    def allocated(self, t: Tensor) -> None:
        """A launcher's new memory: nothing in it is written."""
        if not self.launching:
            return  # what others make they may fill by ways that aren't seen here
        storage = t.untyped_storage()
        self._fresh[storage.data_ptr()] = (storage, np.zeros(storage.nbytes(), bool))

    def written(self, t: Tensor) -> None:
        """Torch has written a tensor."""
        self._fresh.pop(t.untyped_storage().data_ptr(), None)


def _is_of(value: Any, storage: Any) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage().data_ptr() == storage.data_ptr()


def _bytes_of(storage: Any) -> np.ndarray:
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat.numpy()


def touched(t: Tensor) -> np.ndarray:
    """Which bytes of its storage a tensor's elements are in."""
    found = torch.zeros(t.untyped_storage().nbytes() // t.element_size() + 1, dtype=torch.bool)
    view = found.as_strided(t.shape, t.stride(), t.storage_offset())
    view.fill_(True) if t.numel() else None
    return np.repeat(found.numpy(), t.element_size())[: t.untyped_storage().nbytes()]


class _Watch(TorchDispatchMode):
    """Tells a device which tensors torch makes without writing them, and which it writes."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"):
            self.device.allocated(out)
            return out
        if all(r.alias_info is None or r.alias_info.is_write for r in func._schema.returns):
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.device.written(t)
        return out


def _compiled_to_ptx(*arguments: Any) -> Any:
    """Triton's hook on its stages: the text stands for the binary, which needs the assembler."""
    if not arguments:
        return "text for binary", "text for binary"
    arguments[1]["cubin"] = lambda src, metadata: src.encode()
    return None


class _Launcher:
    """What Triton calls for each launch; it keeps this with the kernel, for whichever device."""

    def __init__(self, src: Any, metadata: Any):
        self.src, self.metadata = src, metadata

    def __call__(self, *call: Any) -> None:
        """(grid, stream, function, packed, metadata, two hooks), then the kernel's arguments."""
        pairs = zip(self.src.signature.items(), call[9:], strict=True)
        given = {name: (kind, v) for (name, kind), v in pairs if kind != "constexpr"}
        module = self.src.fn.fn.__module__.rpartition(".")[2]
        threads = WARP * self.metadata.num_warps
        shape = (call[:3], threads, f"{module}.{self.src.fn.__name__}")
        from triton.runtime import driver

        device: Device = driver.active.device  # pyright: ignore[reportAttributeAccessIssue]
        device.launch(call[4], self.metadata.name, shape, self.metadata.shared, given)


class _Driver:
    """Triton's driver, without one."""

    def __init__(self, device: Device):
        from triton.backends.compiler import GPUTarget

        self.device, self.target = device, GPUTarget("cuda", ARCH, WARP)
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, dev: (name, kernel.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda dev: {"max_shared_mem": 163 * 1024},
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return "ptx"  # Triton keeps what it compiled by device: none of a real one is touched

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _launchers(op: str, device: Device) -> dict[tuple[str, str], Callable]:
    """The raw kernels of an op, each of which tells the device while it runs."""
    module = importlib.import_module(f"elmkernels.triton.{op}")

    def telling(fn: Callable) -> Callable:
        def launcher(*args: Any) -> Any:
            device.launching = True
            try:
                return fn(*args)
            finally:
                device.launching = False

        return launcher

    names = [f"{op}_{suffix}" for suffix in backends.declared(op)]
    return {(n, "triton"): telling(getattr(module, n)) for n in names if hasattr(module, n)}


@contextlib.contextmanager
def executed(device: Device | None = None) -> Iterator[Device]:
    """Run Triton's kernels by their PTX, on CPU tensors, while this is open.

    Public ops then take `backend="triton"` on the CPU.

    Args:
        device: how to execute, and where launches are recorded; None for a new one.

    Yields:
        The device.

    Raises:
        ImportError: Triton isn't installed.

    Example:
        >>> with executed() as device:
        ...     y = elmkernels.rms_norm(torch.randn(3, 64), torch.ones(64), backend="triton")
        >>> device.launches[0].kernel
        'rms_norm._fwd'
    """
    from triton import knobs
    from triton.runtime import driver

    device = device or Device()
    ops = [op for op in backends.defined() if backends.implements("triton", op)]
    ops = [op for op in ops if importlib.util.find_spec(f"elmkernels.triton.{op}")]
    launchers = {key: fn for op in ops for key, fn in _launchers(op, device).items()}
    modules = [importlib.import_module(f"elmkernels.triton.{op}") for op in ops]
    inner = [importlib.import_module("elmkernels.triton.common"), *modules]
    changes: list[tuple[Any, str, Any]] = []
    for module in inner:
        for name, value in (("arch", f"sm_{ARCH}"), ("multiprocessors", device.multiprocessors)):
            if hasattr(module, name):
                changes.append((module, name, lambda _, value=value: value))
    changes.append((knobs.runtime, "add_stages_inspection_hook", _compiled_to_ptx))
    kernels, choices = dict(backends._KERNELS), dict(backends._CHOICE)
    active = driver._active
    backends._KERNELS.update(launchers)
    backends._CHOICE.update({(op, "cpu", "triton"): "triton" for op in ops})
    try:
        driver.set_active(_Driver(device))  # pyright: ignore[reportArgumentType]
        with _replaced(changes), warnings.catch_warnings(), _Watch(device):
            warnings.simplefilter("ignore")
            yield device
    finally:
        driver._active = active
        backends._KERNELS.clear()
        backends._KERNELS.update(kernels)
        backends._CHOICE.clear()
        backends._CHOICE.update(choices)
