"""decode_step's CUDA sources compiled for the host, as a function that takes what the op takes."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from elmkernels.testing.cases.decode_step import arena, decoder, with_written
from elmkernels.testing.cases.draw import Draw
from elmkernels.testing.parity import EVALUATIONS, compare, specification
from elmkernels.weights.formats import Arena, DecoderWeights
from elmkernels.weights.table import table_of

from .on_host import DTYPES, compiled

ORDERS = {"forward": 0, "reversed": 1, "shuffled": 2}
POSITIONS = (3, 200, 0, 131)
FAULTS = (
    "", "written beyond shared memory", "written beyond scratch", "counts are left",
    "not aligned to what is loaded",
)  # fmt: skip
POINTERS = (
    "table", "tokens", "positions", "sequences", "offsets", "arena", "logits", "rope_table",
    "chosen",
)  # fmt: skip
NUMBERS = (
    "layers", "batch", "arena_batch", "rope_length", "max_length", "vocab_size", "dim", "head_dim",
    "qkv_width", "ffn_dim", "dtype", "gated", "grid", "rows", "order", "seed", "missing",
)  # fmt: skip


class Call(ctypes.Structure):
    """What decode_simulation.cpp takes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("eps", ctypes.c_double),
    ]


def library_in(folder: Path) -> ctypes.CDLL:
    found = compiled("decode_simulation", folder)
    found.count_barriers.argtypes = [ctypes.c_int64]
    found.count_shared_bytes.argtypes = [ctypes.c_int64] * 5
    found.rank.argtypes, found.rank.restype = [ctypes.c_float, ctypes.c_int64], ctypes.c_uint64
    found.count_barriers.restype = found.count_shared_bytes.restype = ctypes.c_int64
    return found


def simulated(library, grid=5, rows=4, order="forward", seed=0, missing=-1, shift=0):
    """decode_step by the CUDA sources on `grid` blocks, `rows` sequences to a pass over a weight.
    missing: the barrier that is left out. shift: of where the last layer's values begin."""

    def step(
        weights: DecoderWeights,
        tokens: Tensor,
        positions: Tensor,
        cache: Arena,
        chosen: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        table, offsets = table_of(weights), cache.offsets.clone()
        if len(offsets):
            offsets[-1, 1] += shift
        logits = cache.data.new_full((len(tokens), weights.vocab_size), torch.nan)
        tensors = (
            table.rows, tokens, positions, sequences, offsets, cache.data, logits,
            weights.rope_table, chosen,
        )  # fmt: skip
        call = Call(
            *(None if t is None else t.data_ptr() for t in tensors),
            len(weights.layers), len(tokens), cache.batch, len(weights.rope_table),
            cache.max_length,
            weights.vocab_size, weights.model_dim, weights.head_dim, table.qkv_width, table.ffn_dim,
            DTYPES[cache.data.dtype], weights.gated, grid, rows, ORDERS[order], seed, missing,
            weights.eps,
        )  # fmt: skip
        found = library.simulate(ctypes.byref(call))
        assert found == 0, FAULTS[found]
        return logits

    return step


def comparisons(step, weights, tokens, positions, cache, **kwargs):
    """Logits, and the keys and values written, beside truth and yardstick."""

    def of(dtype):
        return cache._replace(data=cache.data.to(dtype, copy=True))

    @functools.cache
    def evaluation(i):
        return specification("decode_step", i)(*call, of(cache.data.dtype), **kwargs)

    call = (weights, tokens, positions)
    truth = specification("decode_step")(*call, of(torch.float64), **kwargs)
    got = with_written(step)(*call, of(cache.data.dtype), **kwargs)
    return [
        compare(truth[i], (evaluation(n)[i] for n in range(EVALUATIONS)), got[i], what)
        for i, what in enumerate(("logits", "keys and values"))
    ]


def assert_parity(step, *call, **kwargs):
    for found in comparisons(step, *call, **kwargs):
        assert found.ok, f"{found.what}: {found.reason}"


def draw(dtype, seed=0):
    return Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed))


def decoding(form, dtype, positions=POSITIONS, **sizes):
    d = draw(dtype)
    weights = decoder(d, form, **sizes)
    tokens = torch.randint(0, weights.vocab_size, (len(positions),), generator=d.generator)
    return weights, tokens, torch.tensor(positions), arena(d, weights, len(positions), 210)
