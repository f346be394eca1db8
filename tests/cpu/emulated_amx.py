"""Attention by tiles whose instructions are emulated, in a process whose package has that library:
emulated_amx.py QUESTION... Prints a JSON line for each question that the test asks, as
{what: why not, or null}.
"""

import itertools
import json
import sys

import torch

# What the processor says; the library's own trial then runs the emulated instructions.
torch.cpu._is_amx_tile_supported = lambda: True

from sanitized import config  # noqa: E402

import elmkernels  # noqa: E402
from elmkernels.backends import AMX, BACKENDS, BASES, choose, defined  # noqa: E402
from elmkernels.testing import CASES  # noqa: E402
from elmkernels.testing.cases.attention import attention_case  # noqa: E402
from elmkernels.testing.cases.draw import Case  # noqa: E402
from elmkernels.testing.parity import Expected  # noqa: E402
from elmkernels.weights.affine import quantize_weight  # noqa: E402
from elmkernels.weights.packed12 import pack_weight  # noqa: E402


def verdict(case: Case) -> str | None:
    """Why a case isn't its reference, forward and backward, in bfloat16."""
    record = Expected(case.op, case, torch.bfloat16).record(AMX)
    return None if record.ok else f"{record.worst.what}: {record.worst.reason}"


def many_rows() -> list[Case]:
    """Products of compressed weights whose rows don't stream."""
    found = []
    for case in CASES["linear"]:
        many = "_rows_9" in case.name or "rows_12" in case.name or "gradient" in case.name
        if many and torch.bfloat16 in case.dtypes and not case.name.startswith("plain"):
            found.append(case)
    return found


def parity() -> dict[str, str | None]:
    """The cases of the ops that tiles are for."""
    cases = [case for case in CASES["attention"] if torch.bfloat16 in case.dtypes]
    return {case.name: verdict(case) for case in cases + many_rows()}


def shapes() -> dict[str, str | None]:
    """Every rest that rows, keys and widths leave of a tile."""
    groups, found = itertools.cycle((1, 3, 4, 5)), {}
    lengths = ((1, 0), (7, 9), (16, 16), (33, 0), (65, 64), (96, 40), (15, 113))
    for (length, before), head_dim in itertools.product(lengths, (8, 40, 64, 80, 96, 128)):
        group, keys = next(groups), before + length
        name = f"group {group}, {before} + {length}, head_dim {head_dim}"
        found[name] = verdict(attention_case(name, 2 * group, 2, head_dim, length, keys, 1))
    return found


def bits() -> dict[str, str | None]:
    """The same bits from any number of threads."""
    q, k = torch.randn(1, 300, 8, 64).bfloat16(), torch.randn(1, 300, 2, 64).bfloat16()

    def results() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, k)]
        out = elmkernels.attention(*leaves, backend=AMX)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    torch.set_num_threads(1)
    first, found = results(), {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        same = all(map(torch.equal, first, results()))
        found[f"{threads} threads"] = None if same else "other bits"
    return found


def choices() -> dict[str, str | None]:
    """Unnamed, nothing takes it; named, it takes what it lacks from its base."""
    found = {}
    for op in defined():
        taken = choose(op, "cpu", AMX), choose(op, "cpu", None)
        wanted = AMX if op in ("attention", "linear") else BASES[AMX], BASES[AMX]
        found[op] = None if taken == wanted else f"{taken} instead of {wanted}"
    return found


def models() -> dict[str, str | None]:
    """A model that names it runs: by tiles in bfloat16, by the base in float32."""
    found = {}
    for dtype, name in ((torch.bfloat16, AMX), (torch.float32, BASES[AMX])):
        model = elmkernels.OpenELM.from_config(config(), seed=0, dtype=dtype)
        elmkernels.accelerate(model, backend=AMX)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(torch.arange(40)[None])
        ran = {e.key for e in profile.key_averages() if "attention" in e.key}
        found[str(dtype)] = None if ran == {f"elmkernels_{name}::attention_fwd"} else f"{ran}"
    return found


def products() -> dict[str, str | None]:
    """Tiles multiply many rows by an affine weight; packed12 keeps the bits of a plain one."""
    plain = torch.randn(70, 320).bfloat16()
    weights = {
        "plain": plain,
        "packed12": pack_weight(plain),
        "int4": quantize_weight(plain, 4, 32),
    }
    found, results = {}, {}
    for rows, (name, weight) in itertools.product((8, 9, 40), weights.items()):
        x = torch.ones(rows, 320).bfloat16()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results[name] = elmkernels.linear(x, weight, backend=AMX)
        tiles = f"elmkernels_{AMX}::linear_many" in {e.key for e in profile.key_averages()}
        right = tiles == (name == "int4" and rows > 8)
        found[f"{rows} by {name}"] = None if right else f"by tiles: {tiles}"
        if name == "packed12" and not torch.equal(results["plain"], results[name]):
            found[f"bits of {rows}"] = "not those of the plain weight"
    return found


if __name__ == "__main__":
    asked = {f.__name__: f for f in (parity, shapes, bits, products, choices, models)}
    print(json.dumps({"missing": BACKENDS[AMX].missing}), flush=True)
    for name in sys.argv[1:]:
        print(json.dumps({name: asked[name]()}), flush=True)
