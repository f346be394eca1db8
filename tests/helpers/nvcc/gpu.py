"""csrc/cuda as a GPU would run it, without one: nvcc's own host code, whose launches are executed
from nvcc's PTX.

The public ops run up to the launches with `backend="cuda"` on CPU tensors: checks, autograd, the
host code with its grids, strides and shared memory, all of which is what a GPU gets.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elmkernels import backends
from elmkernels.testing.ptx import Fault, Launch, Program, Settings, Traffic, execute, parse
from elmkernels.testing.ptx.launch import touched
from elmkernels.testing.ptx.memory import THERE, WRITTEN, Storages
from elmkernels.weights.formats import DecoderWeights, form_of

from .sources import Compiled, of_kernel, plain_name

MOST_SHARED = 163 * 1024  # of an A100's block
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
FILL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)
NEW = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)


def memory_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Part(NamedTuple):
    """Memory that a launch may touch: what of it is there, and what has been written."""

    name: str
    size: int
    there: np.ndarray | bool
    written: np.ndarray


class Ran(NamedTuple):
    """A launch that was executed."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    traffic: Traffic | None
    parts: dict[str, tuple[int, int]]  # where memory of a name lay for the meter, and its size


@dataclass
class Gpu:
    """The GPU that isn't there.

    Attributes:
        compiled: the sources.
        settings: of every execution.
        multiprocessors: that it has.
        rewrite: changes a kernel's PTX before it is executed, as mutations do.
        fewer: blocks, threads in a block and bytes of shared memory than the host asks for.
        known: tensors that no argument names, by their names.
        launches: those so far.
    """

    compiled: Compiled
    settings: Settings = field(default_factory=Settings)
    multiprocessors: int = 4
    rewrite: Callable[[str], str] | None = None
    fewer: tuple[int, int, int] = (0, 0, 0)
    known: dict[str, Tensor] = field(default_factory=dict)
    launches: list[Ran] = field(default_factory=list)
    parts: dict[int, Part] = field(default_factory=dict)
    failed: BaseException | None = None
    programs: dict[tuple, Program] = field(default_factory=dict)

    def call(self, op: Any, *args: Any) -> Any:
        """A raw kernel of nvcc's host code."""
        self.parts, self.failed = {}, None
        writes = {a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write}
        named = dict(zip((a.name for a in op._schema.arguments), args, strict=True))
        tensors = {n: t for n, t in named.items() if isinstance(t, Tensor)}
        for name, t in (*tensors.items(), *self.known.items()):
            self._add(name, t)
        before = {n: t.clone() for n, t in tensors.items() if n not in writes}
        try:
            found = op(*args)
        except RuntimeError:
            if self.failed is not None:
                raise self.failed from None
            raise
        written = [tensors[name] for name in writes if name in tensors]
        for name, t in before.items():
            shares = any(_overlap(tensors[name], other) for other in written)
            if not shares and not same_bytes(t, tensors[name]):
                raise Fault("bounds", f"{name} is an input, and is written")
        for t in found if isinstance(found, tuple) else (found,):
            self._whole(t)
        return found

    def _whole(self, t: Tensor) -> None:
        part = self.parts.get(t.untyped_storage().data_ptr())
        if part is not None and t.numel() and not part.written[touched(t)].all():
            raise Fault("uninitialized", f"of {list(t.shape)}, an output, not all is written")

    def _add(self, name: str, t: Tensor) -> None:
        storage = t.untyped_storage()
        if not storage.nbytes():
            return
        own = touched(t)
        old = self.parts.get(storage.data_ptr())
        if old is not None:
            own = own | old.there
            name = f"{old.name}, {name}" if name != old.name else name
        self.parts[storage.data_ptr()] = Part(
            name, storage.nbytes(), own, np.ones(storage.nbytes(), bool)
        )

    def made(self, address: int | None, size: int, written: int) -> None:
        """The host code has a new tensor, or what it made contiguous."""
        if not size or address is None or (written and address in self.parts):
            return
        for at in [a for a, p in self.parts.items() if a < address + size and address < a + p.size]:
            del self.parts[at]  # it was given back
        name = f"new {len(self.parts)}"
        self.parts[address] = Part(name, size, True, np.full(size, bool(written)))

    def fill(self, address: int, value: int, size: int) -> int:
        """cudaMemsetAsync."""
        for begin, part in self.parts.items():
            if begin <= address and address + size <= begin + part.size:
                memory_at(address, size)[:] = value
                part.written[address - begin :][:size] = True
                return 0
        self.failed = Fault("bounds", f"cudaMemsetAsync of {size} bytes of no tensor")
        return 1

    def launch(self, name: bytes, shape: Any, shared: int, arguments: Any) -> int:
        """A kernel's launch; 0, or an error of CUDA's, whose reason is kept."""
        try:
            self._launch(name.decode(), tuple(shape[:6]), shared, arguments)
        except BaseException as error:  # it goes on behind the host code
            self.failed = error
            return 999
        return 0

    def _program(self, name: str) -> Program:
        """A kernel made ready; what isn't changed is made once."""
        key = (name, self.settings.share)
        cache = _PROGRAMS if self.rewrite is None else self.programs
        if key not in cache:
            text = of_kernel(self.compiled.ptx, name)
            text = self.rewrite(text) if self.rewrite else text
            cache[key] = Program(parse(text, name), name, self.settings.share)
        return cache[key]

    def _launch(self, name: str, shape: tuple[int, ...], shared: int, arguments: Any) -> None:
        program = self._program(name)
        blocks, threads, room = self.fewer
        grid, block = (
            (shape[0] - blocks, shape[1], shape[2]),
            (shape[3] - threads, shape[4], shape[5]),
        )
        shared -= room
        threads = block[0] * block[1] * block[2]
        most = program.function.threads
        if most is not None and threads > most:
            raise Fault("launch", f"{threads} threads a block, of {most} at most")
        if program.static_shared + shared > MOST_SHARED:
            raise Fault("launch", f"{program.static_shared + shared} bytes of shared memory")
        params = bytearray(program.param_bytes)
        for i, v in enumerate(program.function.params):
            params[v.offset : v.offset + v.size] = ctypes.string_at(arguments[i], v.size)
        storages = []
        for address, part in self.parts.items():
            marks = np.where(part.there, THERE, 0) | np.where(part.written, WRITTEN, 0)
            data = memory_at(address, part.size)
            marks = np.broadcast_to(marks, part.size).astype(np.uint8)
            storages.append((part.name, address, data, marks))
        memory = Storages(storages)
        launch = Launch(grid, block, shared, bytes(params), memory, self.settings)
        traffic = execute(program, launch)
        places = {r.name: (r.begin, r.size) for r in memory.regions}
        self.launches.append(Ran(plain_name(name), grid, block, shared, traffic, places))
        for i, (_, address, _, _) in enumerate(sorted(storages, key=lambda s: s[1])):
            data, marks = memory.data(i)
            part = self.parts[address]
            memory_at(address, part.size)[:] = data
            part.written[:] |= (marks & WRITTEN) != 0


_PROGRAMS: dict[tuple, Program] = {}


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def parts_of(weights: DecoderWeights) -> dict[str, Tensor]:
    """A decoder's tensors, which a kernel reaches through a table of addresses."""
    found: dict[str, Tensor] = {}

    def add(name: str, weight: Any) -> None:
        parts = (weight,) if isinstance(weight, Tensor) else form_of(weight).parts()
        for i, part in enumerate(parts):
            if isinstance(part, Tensor):
                found[f"{name}.{i}" if i else name] = part

    for i, layer in enumerate(weights.layers):
        for field_name, value in layer._asdict().items():
            if value is not None and not isinstance(value, int):
                add(f"layer {i} {field_name}", value)
    add("embedding", weights.embedding)
    add("head", weights.head)
    add("norm", weights.norm)
    return found


@contextlib.contextmanager
def executed(gpu: Gpu, ops: Iterable[str] | None = None) -> Iterator[Gpu]:
    """Run csrc/cuda by its PTX, on CPU tensors, while this is open, with `backend="cuda"`."""
    ops = tuple(ops or (op for op in backends.defined() if backends.implements("cuda", op)))
    callbacks = LAUNCH(gpu.launch), FILL(gpu.fill), NEW(gpu.made)
    gpu.compiled.library.connect(*callbacks, gpu.multiprocessors, MOST_SHARED)
    kernels, choices = dict(backends._KERNELS), dict(backends._CHOICE)

    def raw(name: str) -> Callable:
        op = getattr(torch.ops.elmkernels_cuda, name).default
        return lambda *args: gpu.call(op, *args)

    try:
        for op in ops:
            backends._CHOICE[op, "cpu", "cuda"] = "cuda"
            for suffix in backends.declared(op):
                backends._KERNELS[f"{op}_{suffix}", "cuda"] = raw(f"{op}_{suffix}")
        yield gpu
    finally:
        backends._KERNELS.clear()
        backends._KERNELS.update(kernels)
        backends._CHOICE.clear()
        backends._CHOICE.update(choices)
