"""Attention through transformers' interface, both ways.

`attn_implementation="elmkernels"` is the op `attention` for any model of transformers, with no
mask where rows are causal and without padding, and a mask of keys where they are padded. The other
way round, `Attend` gives the attention of this package's model to whatever implementation its
configuration names ("sdpa", "eager", "flex_attention", ...), and its keys and values to whatever
cache it was given.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import ops

NAME = "elmkernels"
# What the op doesn't do; a model that asks for any of them gets torch's attention.
_BEYOND = ("softcap", "s_aux", "position_bias")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal grouped-query attention by `elmkernels.attention`, as transformers calls it.

    Args:
        module: the attention module; its `is_causal` counts if the argument is None.
        query: [batch, q_heads, lq, head_dim].
        key, value: [batch, kv_heads, lk, head_dim].
        attention_mask: None, or as `attention_mask_function` makes it: bool [batch, lk]. Another
            one is given to torch's attention, as is what the op doesn't do: dropout, no causality.
        dropout: of the weights.
        scaling: of the scores; None for head_dim^-0.5.
        is_causal: whether query i sees no more than the keys up to its own.
        kwargs: of other implementations.

    Returns:
        [batch, lq, q_heads, head_dim], and None for the weights, which are never made.

    Example:
        >>> out, _ = attention_forward(module, q, k, v, None)
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    dense = attention_mask is not None and attention_mask.dim() != 2
    odd = value.shape[-1] != key.shape[-1] or query.dtype not in _DTYPES
    if dense or dropout or not causal or odd or any(kwargs.get(n) is not None for n in _BEYOND):
        if attention_mask is not None and not dense:
            attention_mask = _dense(attention_mask, query.shape[2])
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    out = ops.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        key_mask=attention_mask,
        scale=scaling,
    )
    return out, None


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dense(key_mask: Tensor, lq: int) -> Tensor:
    """A mask of keys [batch, lk] as a causal one of pairs [batch, 1, lq, lk]."""
    lk = key_mask.shape[1]
    ones = torch.ones(lq, lk, dtype=torch.bool, device=key_mask.device)
    return ones.tril(lk - lq) & key_mask[:, None, None, :].bool()


def attention_mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` takes: the least that says what may be seen.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes, and where they begin.
        mask_function: which keys a query sees.
        attention_mask: bool [batch, tokens], False for padding; None for none.
        kwargs: of other implementations.

    Returns:
        None for causal rows without padding, bool [batch, kv_length] for causal rows with padding,
        and for any other pattern bool [batch, 1, q_length, kv_length].

    Example:
        >>> attention_mask_function(1, 4, 4) is None
        True
    """
    aligned = kv_offset == 0 and q_offset + q_length == kv_length
    if mask_function is not causal_mask_function or not aligned:
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **kwargs,
        )  # fmt: skip
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:].bool()
    return None if bool(attention_mask.all()) else attention_mask


def register() -> None:
    """Make the implementation known by its name, with its masks: without those transformers would
    drop padding silently.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask_function)


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in separate operations, the weights in memory; the softmax is float32."""
    groups = module.num_key_value_groups
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class _AsTheySeeIt:
    """An attention module with the attributes that transformers' implementations read."""

    is_causal = True

    def __init__(self, attn: nn.Module, config: Any) -> None:
        self.attn, self.config = attn, config
        self.layer_idx = attn.layer_index
        self.num_key_value_groups = attn.q_heads // attn.kv_heads
        self.scaling = attn.head_dim**-0.5

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)


class Attend:
    """What takes attention's place in one forward pass (see `Context.attend`).

    Args:
        config: the model's; it names the implementation.
        cache: keys and values of the tokens before; None for none.
        mask: as that implementation's masks are.
        options: what it is called with besides.

    Attributes:
        weights: of each layer, [batch, heads, lq, lk], if the implementation makes them.
    """

    def __init__(
        self, config: Any, cache: Cache | None, mask: Any, options: dict[str, Any]
    ) -> None:
        self.config, self.cache, self.mask, self.options = config, cache, mask, options
        self.weights: list[Tensor] = []

    def __call__(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v [batch, length, heads, head_dim] -> [batch, length, q_heads, head_dim]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.cache is not None:
            k, v = self.cache.update(k, v, attn.layer_index)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mask = self.mask.to(q.device) if isinstance(self.mask, Tensor) else self.mask
        out, weights = attention_interface(
            _AsTheySeeIt(attn, self.config), q, k, v, mask, dropout=0.0,
            scaling=attn.head_dim**-0.5, **self.options,
        )  # fmt: skip
        if weights is not None:
            self.weights.append(weights)
        return out
