"""How much an op's Triton kernels move, beside the least that they must: counted while the PTX that
sm_80 would get is executed on a CPU.

Of a pass, every launch counts. `asked` is what threads load and store, `sectors` are the sectors of
32 bytes that the accesses of warps touch, each access by itself, and `distinct` those that a launch
touches at all: what a GPU moves lies between the last two, as its caches have it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ... import ops
from ...backends import traits
from ...checks import fail
from ..cases import CASES, OPS
from ..cases.draw import Case, make
from ..parity import run_case
from .launch import Device, Executed, executed
from .state import Settings
from .traffic import SECTOR

# Cases of the ops with products: their real shapes would take minutes each.
SMALL = {
    "attention": ("chunk", "ragged_tokens", "varlen_strided"),
    "linear": (
        "plain_rows_3", "affine8_64_rows_2", "affine4_32_rows_5", "packed12_rows_3",
        "affine4_64_gradient_rows_17",
    ),
    "linear_cross_entropy": ("mean_every_option",),
}  # fmt: skip
MODELS = ("OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B", "OpenELM-3B")
ROWS = 17
AGAIN = 0.01  # of the least bytes: more is named
MULTIPROCESSORS = 108  # of an A100, which sm_80 is


@dataclass(frozen=True)
class Launched:
    """What one kernel moved; see `Pass`."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    asked: int
    sectors: int
    distinct: int
    shared: int
    conflicts: int
    issued: dict[str, int]
    tensors: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Pass:
    """What one pass of an op moved.

    Attributes:
        op, case, dtype: of the call.
        direction: "forward" or "backward".
        least: bytes that it must move, as the op's record has it; 0 if that says nothing of it.
        elements: that it gives.
        launches: its kernels, in order. `asked`, `sectors` and `distinct` are bytes, loads and
            stores together; `shared` is accesses of shared memory by warps, `conflicts` the cycles
            that these take beyond one each; `issued` is instructions of warps by class; `tensors`
            are the sectors of each tensor and how many different, by the kernel's names for it.
    """

    op: str
    case: str
    dtype: str
    direction: str
    least: int
    elements: int
    launches: list[Launched]

    def total(self, name: str) -> int:
        """The sum of an attribute of the launches."""
        return sum(getattr(launched, name) for launched in self.launches)

    @property
    def again(self) -> dict[str, float]:
        """How many times over accesses touch the sectors of a tensor, if that is more than once
        beside the least: what caches have to hold."""
        found: dict[str, float] = {}
        for launched in self.launches:
            for name, (sectors, distinct) in launched.tensors.items():
                if SECTOR * (sectors - distinct) > AGAIN * self.least:
                    found[name] = max(found.get(name, 0.0), sectors / distinct)
        return found

    @property
    def issued(self) -> Counter:
        """Instructions of warps by class."""
        return sum((Counter(launched.issued) for launched in self.launches), Counter())

    @property
    def per_element(self) -> float:
        """Instructions of threads for each element that it gives."""
        return 32 * self.issued.total() / max(1, self.elements)

    def json(self) -> dict[str, Any]:
        """All of it, for a file."""
        totals = {name: self.total(name) for name in ("asked", "sectors", "distinct", "conflicts")}
        return asdict(self) | totals | {"instructions per element": self.per_element}

    def row(self) -> dict[str, Any]:
        """The pass as one line of a table."""
        names = dict.fromkeys(launched.kernel.partition(".")[2] for launched in self.launches)
        moved = ("asked", "sectors", "distinct")
        shares = {name: self.total(name) / self.least if self.least else None for name in moved}
        return {
            "op": self.op,
            "case": self.case,
            "dtype": self.dtype,
            "pass": self.direction,
            "kernels": " ".join(names),
            "least bytes": self.least,
            **shares,
            "conflicts": self.total("conflicts") / max(1, self.total("shared")),
            "instructions": self.per_element,
        }


def _launched(one: Executed) -> Launched:
    t = one.traffic
    if t is None:
        fail("settings", "Settings(traffic=True)", "launches that were not counted")
    cycles = sum(n for name, n in t.shared.items() if name.endswith("cycles"))
    accesses = sum(n for name, n in t.shared.items() if name.endswith("accesses"))
    return Launched(
        one.kernel, one.grid, one.threads, t.asked.total(), SECTOR * t.sectors.total(),
        SECTOR * sum(map(len, t.touched.values())), accesses, cycles - accesses, dict(t.issued),
        one.tensors,
    )  # fmt: skip


def cases_of(op: str, rows: Sequence[int] = (ROWS,), models: Sequence[str] = MODELS) -> list[Case]:
    """The calls that are metered: of ops without products a layer of each model, of others a small
    case of each kind of kernel.

    Args:
        op: its name.
        rows: how many tokens at once, of the former.
        models: of the former.

    Raises:
        ValueError: there is no such op, or Triton has no kernels for it.
    """
    if op not in CASES:
        fail("op", f"one of {', '.join(CASES)}", repr(op))
    if op in SMALL:
        return [next(c for c in CASES[op] if c.name.startswith(name)) for name in SMALL[op]]
    if traits(op).whole_model:
        fail("op", "one that Triton has kernels for", repr(op))
    names = [model.removeprefix("OpenELM-") for model in models]
    return [case for name in names for case in OPS[op].bench_cases(name, tuple(rows), 0)]


def measure(op: str, case: Case, dtype: torch.dtype, seed: int = 0) -> Iterator[Pass]:
    """Run a call and its backward, if it has one, by PTX; the results are not judged.

    Args:
        op: its name.
        case: the inputs.
        dtype: the working dtype.
        seed: of the inputs.

    Yields:
        A Pass for each direction that launches anything.

    Raises:
        ImportError: Triton isn't installed.
    """
    inputs = make(case, dtype, "cpu", seed)
    outputs: list[torch.Tensor] = []
    ended = 0
    device = Device(Settings(traffic=True), multiprocessors=MULTIPROCESSORS)
    with executed(device):

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal ended
            found = getattr(ops, op)(*args, backend="triton", **kwargs)
            outputs.extend(found if isinstance(found, tuple) else (found,))
            ended = len(device.launches)
            return found

        gradients = run_case(call, case, inputs, None, seed)
    launches = [_launched(one) for one in device.launches]
    detached = tuple(out.detach() for out in outputs)
    forward = OPS[op].least_bytes(*inputs, detached, False)
    least = {"forward": forward, "backward": OPS[op].least_bytes(*inputs, detached, True) - forward}
    given = {
        "forward": sum(out.numel() for out in outputs),
        "backward": sum(g.numel() for name, g in gradients.items() if name.startswith("grad ")),
    }
    parts = {"forward": launches[:ended], "backward": launches[ended:]}
    for direction, some in parts.items():
        if some:
            name = str(dtype).removeprefix("torch.")
            yield Pass(op, case.name, name, direction, least[direction], given[direction], some)
