"""Small kernels in PTX: one block whose threads each take an element and give some."""

import numpy as np

from elmkernels.testing.ptx import Launch, Program, Settings, Traffic, execute, parse
from elmkernels.testing.ptx.memory import THERE, WRITTEN, Tensors

REGISTER = {1: "h", 2: "h", 4: "r", 8: "d"}
HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
{functions}
.visible .entry kernel({params})
{{
 .reg .pred %p<16>;
 .reg .b16 %h<64>;
 .reg .b32 %r<64>;
 .reg .b64 %d<64>;
 .reg .b64 %at<32>;
 mov.u32 %r63, %tid.x;
{loads}
{body}
{stores}
 ret;
}}
"""


def text(
    body: str, inputs: list[np.ndarray], gives: list[str], dtype: np.dtype, functions: str = ""
) -> str:
    """A kernel that loads element tid of input i into the register i of its size, and stores the
    registers `gives`, one after the other, as element tid of the output."""
    count = len(inputs) + 1
    params = ", ".join(f".param .u64 q{i}" for i in range(count))
    loads, used = [], {"h": 0, "r": 0, "d": 0}
    for i, x in enumerate(inputs):
        letter = REGISTER[x.itemsize]
        loads.append(f" ld.param.u64 %at{i}, [q{i}];")
        loads.append(f" mad.wide.u32 %at{i}, %r63, {x.itemsize}, %at{i};")
        loads.append(f" ld.global.u{8 * x.itemsize} %{letter}{used[letter]}, [%at{i}];")
        used[letter] += 1
    size, last = dtype.itemsize, count - 1
    stores = [f" ld.param.u64 %at31, [q{last}];"]
    stores += [f" mad.wide.u32 %at31, %r63, {size * len(gives)}, %at31;"]
    stores += [f" st.global.u{8 * size} [%at31+{i * size}], {g};" for i, g in enumerate(gives)]
    return HEAD.format(
        params=params, loads="\n".join(loads), body=body, functions=functions,
        stores="\n".join(stores if gives else []),
    )  # fmt: skip


def run(body: str, *inputs: np.ndarray, **options) -> np.ndarray:
    """What the threads of a kernel give: [threads], or [threads, gives]."""
    return launch(body, *inputs, **options)[0]


def launch(
    body: str,
    *inputs: np.ndarray,
    gives: list[str] | str = "%r10",
    dtype: object = np.uint32,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    settings: Settings | None = None,
    functions: str = "",
    room: int = 0,
) -> tuple[np.ndarray, Traffic | None]:
    """The same, and what it moved. room: how many elements more, zeros, the output has."""
    names = [gives] if isinstance(gives, str) else gives
    dtype = np.dtype(dtype)
    out = np.zeros(threads * len(names) + room, dtype)
    arrays = [np.broadcast_to(np.asarray(x), threads).copy() for x in inputs]
    parts = []
    for i, x in enumerate((*arrays, out)):
        marks = THERE | (WRITTEN if i < len(arrays) or room else 0)
        raw = x.view(np.uint8)
        parts.append((f"q{i}", 0, raw, np.full(raw.size, marks, np.uint8)))
    memory = Tensors(parts)
    params = b"".join(np.uint64(memory.address(i, 0)).tobytes() for i in range(len(parts)))
    program = Program(
        parse(text(body, arrays, names, dtype, functions)), "kernel", (settings or Settings()).share
    )
    grid = (blocks, 1, 1)
    grid_of = Launch(grid, (threads, 1, 1), shared, params, memory, settings or Settings())
    traffic = execute(program, grid_of)
    found = memory.data(len(arrays))[0].view(dtype)[: threads * len(names)]
    return found if isinstance(gives, str) else found.reshape(threads, len(names)), traffic
