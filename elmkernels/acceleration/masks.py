"""The dense causal mask of Apple's Hugging Face code, kept instead of made anew at every step.

Its body makes a mask [batch, 1, n, n] of its whole context length n in every forward pass, of which
a layer uses the rows of its tokens. Here the body's own method makes it once: for a batch without
padding one row of the batch that the others share, else, without gradients, until other tokens are
padding. Attention that is given the first, for tokens that follow those of the cache, is causal and
nothing more, and so needs no mask.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..derivatives import unusual
from ..surgery import plain_tensor


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _padding(attention_mask: Tensor) -> Tensor:
    """Which tokens are padding [batch, length], without the columns after the last of them."""
    padding = attention_mask == 0
    columns = padding.any(dim=0).nonzero()
    return padding[:, : int(columns[-1]) + 1 if len(columns) else 0]


def _usual(attention_mask: Tensor | None, batch: int, n: int) -> bool:
    """Whether a mask says of each token of a batch, n at most, if it is padding; None says none."""
    if attention_mask is None:
        return True
    if not plain_tensor(attention_mask) or attention_mask.dim() != 2:
        return False
    return attention_mask.shape[0] == batch and attention_mask.shape[1] <= n


def _captured(x: Tensor) -> bool:
    """Whether what is computed now is recorded, so that nothing may be decided by values."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or unusual():
        return True
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def causal_like(mask: Tensor) -> Tensor:
    """[n, n]: 0 up to the diagonal, the dtype's lowest number above it."""
    lowest = torch.finfo(mask.dtype).min
    return torch.full_like(mask[0, 0], lowest).triu(1)


class Masks:
    """The masks that one body gave. Its attentions hold the same object."""

    def __init__(self) -> None:
        # Of what, the mask, its version, and whether it is the causal one.
        self._shared_one: tuple[Any, Tensor, int, bool] | None = None
        self._padded: tuple[Any, Tensor, Tensor, int] | None = None  # and its padding
        self._checked: tuple[Any, ...] | None = None

    def __reduce__(self) -> Any:
        return Masks, ()

    def of(
        self,
        body: Any,
        make: Callable[[Tensor | None, Tensor], Any],
        attention_mask: Tensor | None,
        x: Tensor,
    ) -> Any:
        """What make(attention_mask, x) gives. make: the body's method; x: [batch, length, d]."""
        own, n = body.causal_mask, body.causal_mask.shape[-1]
        if (
            _captured(x)
            or not plain_tensor(x)
            or not plain_tensor(own)
            or x.shape[1] > n  # it makes itself a larger one
            or not _usual(attention_mask, x.shape[0], n)
        ):
            return make(attention_mask, x)
        kind = body.config._attn_implementation
        of = x.dtype, x.device, kind, own, own.data_ptr(), _version(own)
        padding = None if attention_mask is None else _padding(attention_mask)
        if padding is None or padding.shape[1] == 0:
            return self._shared(of, make, x)
        if torch.is_grad_enabled():
            return make(attention_mask, x)
        kept = self._padded
        if kept is not None and _same(of, kept[0]) and _version(kept[2]) == kept[3]:
            if kept[1].shape == padding.shape and torch.equal(kept[1], padding):
                return kept[2]
        with torch.inference_mode(False):
            mask = make(attention_mask, x)
        if isinstance(mask, Tensor):
            self._padded = of, padding, mask, _version(mask)
        return mask

    def _shared(self, of: Any, make: Callable[[Tensor | None, Tensor], Any], x: Tensor) -> Any:
        """The mask of a batch without padding: one that all its rows share."""
        self._padded, kept = None, self._shared_one
        if kept is None or not _same(of, kept[0]) or _version(kept[1]) != kept[2]:
            with torch.inference_mode(False), torch.no_grad():
                mask = make(None, x[:1])
                if not isinstance(mask, Tensor):
                    return mask
                kept = of, mask, _version(mask), torch.equal(mask[0, 0], causal_like(mask))
            self._shared_one = kept
        return kept[1].expand(x.shape[0], -1, -1, -1)

    def causal(self, mask: Tensor | None, positions: Tensor | None, past: int) -> bool:
        """Whether a mask is one without padding that was given here, and positions [length] are
        those after `past` tokens. A mask is known by its memory: checkpointing hands out detached
        tensors, and asks again after other forward passes.
        """
        if torch.compiler.is_compiling() or unusual():
            return False
        kept = self._shared_one
        if mask is None or positions is None or kept is None or not plain_tensor(mask):
            return False
        if not kept[3] or not _is(mask, kept[1]) or _version(mask) != kept[2]:
            return False
        # Every layer of a forward pass asks the same.
        asked = positions, _version(positions), past
        checked = self._checked
        if checked is None or not _same(asked, checked[0]):
            expected = torch.arange(past, past + positions.numel(), device=positions.device)
            checked = self._checked = asked, torch.equal(positions, expected)
        return checked[1]


def _is(mask: Tensor, kept: Tensor) -> bool:
    """Whether a mask [batch, 1, n, n] is the one of all rows that is kept."""
    if mask.data_ptr() != kept.data_ptr() or mask.dtype != kept.dtype:
        return False
    return mask.shape[1:] == kept.shape[1:] and mask.stride()[-2:] == kept.stride()[-2:]


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two descriptions are equal, tensors in them being the same objects."""
    return all(x is y if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
