"""Batches of more rows than `ops.decode_step` takes: in groups of as many, or by the layers.

A group reads every weight once more, as it is stored, in one call. The layers multiply all rows at
once by torch's products: of a plain weight by its prepacked copy if there may be one, of a
compressed one by blocks that are made dense at every step. Which is faster depends on the form and
the rows (`processors.GROUPED`). A group costs the same whatever stands beside it, so that no batch
falls off a cliff at its ninth row.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import ops
from ..acceleration.projections import Linear
from ..acceleration.routines import PREPACKED, SEVERAL_ROWS
from ..openelm.cache import KVCache
from ..openelm.model import OpenELM
from ..ops.decode_step import MAX_BATCH
from ..processors import GROUPED, row
from ..weights.formats import Arena, DecoderWeights, form_of

MOST = max(row.choice for row in GROUPED.values())

# {a cache: (its arena, the arenas of its rows in groups)}: kernels know an arena by its offsets.
_ARENAS: WeakKeyDictionary[KVCache, tuple[Arena, list[Arena]]] = WeakKeyDictionary()


def arenas_of(cache: KVCache) -> list[Arena]:
    """A cache's memory as arenas of at most MAX_BATCH rows each, in order."""
    whole = cache.arena
    known = _ARENAS.get(cache)
    if known is not None and known[0].offsets is whole.offsets:
        return known[1]
    shares = torch.tensor(cache.kv_heads, device="cpu")[:, None] * whole.max_length * whole.head_dim
    found = [
        whole._replace(
            offsets=whole.offsets + begin * shares, batch=min(MAX_BATCH, cache.batch - begin)
        )
        for begin in range(0, cache.batch, MAX_BATCH)
    ]
    _ARENAS[cache] = whole, found
    return found


def grouped(model: OpenELM, weights: DecoderWeights, batch: int) -> bool:
    """Whether `decode_step` decodes a batch, in groups if it has more rows than that takes."""
    if batch <= MAX_BATCH:
        return True
    first: Any = model.layers[0]
    projection = first.attn.qkv_proj
    if isinstance(projection, Linear) and batch <= SEVERAL_ROWS:
        routine = projection.plan.of_rows(batch)
        if routine == PREPACKED and batch >= projection.products.patience:
            return False
    bits = form_of(weights.layers[0].qkv_proj).parts().bits
    found = row(GROUPED, bits, weights.norm.dtype)
    return found is not None and batch <= found.choice


def step(weights: DecoderWeights, tokens: Tensor, cache: KVCache, backend: str | None) -> Tensor:
    """logits [batch, vocab_size] of one token a row; the cache doesn't count it yet."""
    lengths = cache.lengths
    if cache.batch <= MAX_BATCH:  # the usual, without a copy
        return ops.decode_step(weights, tokens, lengths, cache.arena, backend=backend)
    logits, begin = weights.norm.new_empty((cache.batch, weights.vocab_size)), 0
    for arena in arenas_of(cache):
        rows = slice(begin, begin + arena.batch)
        given = tokens[rows], lengths[rows], arena
        logits[rows] = ops.decode_step(weights, *given, backend=backend)
        begin += arena.batch
    return logits
