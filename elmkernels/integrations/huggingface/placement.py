"""Where the tokens of a call go: their positions, what they see, and where the cache writes them.

transformers says it with a mask of real tokens [batch, past + length] and with positions. Padding
is never computed with a mask if it can be left out: with a cache, the real tokens of each row are
moved together (`Placement.order`), written at their own positions, and the results moved back;
without one, rows that are padded on the right need no mask, as nothing real sees what is behind it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import fail
from ...openelm.layers import Context, Rotation
from .cache import OpenELMCache


class Placement(NamedTuple):
    """The context of a forward pass, and how its rows were moved."""

    context: Context
    new: int | list[int]  # tokens that the cache counts, of each row or of all
    order: Tensor | None = None  # [batch, length]: the place that each token is taken from
    real: Tensor | None = None  # bool [batch, length]: which of the new tokens are

    def moved(self, x: Tensor) -> Tensor:
        """x [batch, length, ...] with the real tokens of each row first."""
        return x if self.order is None else _gather(x, self.order)

    def back(self, x: Tensor) -> Tensor:
        """x [batch, length, ...] in the caller's order again; padding is arbitrary."""
        return x if self.order is None else _gather(x, self.order.argsort(1))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    index = index[(...,) + (None,) * (x.dim() - 2)]
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def real_tokens(mask: Tensor | None, batch: int, past: int, length: int) -> Tensor | None:
    """A mask of tokens as bool [batch, past + length], None if all are real.

    Args:
        mask: [batch, past + length], 0 for padding; None for none.
        batch, past, length: what it must be for.

    Raises:
        ValueError: it has another shape.
    """
    if mask is None:
        return None
    if mask.shape != (batch, past + length):
        fail("attention_mask", f"{[batch, past + length]} (past + new tokens)", list(mask.shape))
    real = mask.bool()
    return None if bool(real.all()) else real


def documents(position_ids: Tensor) -> Tensor | None:
    """Where documents end in rows whose positions begin anew with each: int64 [documents + 1] over
    the rows one after another. None for positions that say something else.

    Args:
        position_ids: integers [batch, length].
    """
    batch, length = position_ids.shape
    starts = position_ids == 0
    steps = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if not bool((starts[:, 0]).all()) or not bool((steps | starts[:, 1:]).all()):
        return None
    bounds = starts.flatten().nonzero()[:, 0]
    return torch.cat((bounds, bounds.new_tensor([batch * length])))


def without_cache(
    table: Tensor, real: Tensor | None, position_ids: Tensor | None, batch: int, length: int
) -> Placement:
    """The tokens of a pass that keeps no keys and values.

    Args:
        table: the model's rotary table.
        real: see `real_tokens`.
        position_ids: [batch or 1, length]; None if they follow from the padding.
        batch, length: of the tokens.

    Returns:
        The Placement.
    """
    positions = torch.arange(length, device=table.device).expand(batch, -1)
    if real is not None and bool((real[:, 1:] <= real[:, :-1]).all()):
        real = None  # padding on the right, which nothing real sees
    if real is not None:
        positions = (real.cumsum(1) - 1).clamp(min=0)
    if position_ids is None or _same(position_ids, positions, real):
        return Placement(Context(positions, Rotation(table), real, None, None), length)
    position_ids = position_ids.expand(batch, -1).long()
    bounds = documents(position_ids) if real is None else None
    if bounds is not None:
        return Placement(
            Context(position_ids, Rotation(table), None, None, None, None, bounds), length
        )
    return Placement(Context(position_ids, Rotation(table), real, None, None), length)


def in_cache(
    table: Tensor,
    cache: OpenELMCache,
    real: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    length: int,
) -> Placement:
    """The tokens of a pass that a cache with room for them holds afterwards.

    Args:
        table, position_ids, batch, length: as `without_cache` takes them.
        cache: what each row holds already.
        real: of the tokens seen and the new ones.

    Returns:
        The Placement.

    Raises:
        ValueError: the mask says something else of tokens in the cache than it did before.
    """
    new = _new(cache, real)
    kv, device = cache.kv, table.device
    offsets = kv.lengths.to(device) if kv.ragged else None
    first = torch.tensor(kv.length, device=device) if offsets is None else offsets[:, None]
    slots = (first + torch.arange(length, device=device)).expand(batch, -1)
    positions, order, counts = slots, None, length
    if new is not None:
        order = (~new).to(torch.int8).argsort(dim=1, stable=True)
        counts = new.sum(1).tolist()
    if position_ids is not None:
        given = position_ids.expand(batch, -1).long()
        given = given if order is None else given.gather(1, order)
        counted = None
        if new is not None:
            counted = torch.arange(length, device=device) < new.sum(1)[:, None]
        if not _same(given, slots, counted):
            positions = given.clamp(0, table.shape[0] - 1)
    return Placement(
        Context(positions, Rotation(table), None, kv, slots, offsets), counts, order, new
    )


def _new(cache: OpenELMCache, real: Tensor | None) -> Tensor | None:
    """Of the new tokens those that are real, None for all; the others must be what they were."""
    if real is None and cache.real is None:
        return None
    before = None if real is None else real[:, : cache.seen]
    if cache.real is None:
        same = bool(before.all())
    else:
        same = before is not None and torch.equal(before, cache.real.to(before.device))
    if not same:
        raise ValueError(
            f"attention_mask must say of the {cache.seen} tokens in the cache what it said when "
            "they were written (a cache of another class, as DynamicCache, takes any mask)"
        )
    new = real[:, cache.seen :]
    return None if bool(new.all()) else new


def is_next(
    cache: OpenELMCache, real: Tensor | None, position_ids: Tensor | None, n: int = 1
) -> bool:
    """Whether n new tokens a row simply follow what the row holds.

    Args:
        cache: with a pass behind it.
        real, position_ids: as `in_cache` takes them.
        n: how many tokens.

    Raises:
        ValueError: as `in_cache`.
    """
    if _new(cache, real) is not None:
        return False
    if position_ids is None:
        return True
    rows = [[held + i for i in range(n)] for held in cache.kv.rows]
    given = position_ids.tolist()
    return (given * len(rows) if len(given) == 1 else given) == rows


def _same(position_ids: Tensor, positions: Tensor, real: Tensor | None) -> bool:
    """Whether given positions are those that follow from the padding, at the real tokens."""
    same = position_ids.to(positions.device) == positions
    return bool((same if real is None else same | ~real).all())
