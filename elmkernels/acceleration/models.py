"""The fused classes of whole models of others' code: what stands round the layers.

Apple's Hugging Face code is a body, whose mask is kept (see `masks`), in a model with a fused head
and loss; both keep their own class's name, as configurations are saved by it. CoreNet's
is body and model in one: its head is the fused one, and it is given a `loss`, as CoreNet computes
losses of logits outside of its models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..derivatives import unusual
from ..devices import autocast_dtype
from ..openelm.loss import plain_weight
from ..reference import cross_entropy
from ..surgery import plain_tensor
from .classes import Fused, while_fused
from .fused import State, takes_norm
from .masks import Masks
from .projections import Products, forget

_IGNORED = -100  # transformers' target that doesn't count


@dataclass
class BodyState:
    """masks: what its attentions ask whether a mask is causal."""

    masks: Masks


@dataclass
class ModelState(State):
    """backend: of `ops.linear_cross_entropy`; products: the routines of a tied head; output: the
    class of what a model returns, None if that is no class of its own.
    """

    products: Products
    output: type | None = None


@cache
def deferring(kind: type) -> type:
    """A class of a transformers output whose logits are made at their first use, by `make_logits`:
    the fused loss makes none, and a trainer asks for the loss alone.
    """

    @dataclass
    class DeferredLogits(kind):
        """An output whose logits are made at their first use."""

        make_logits: Callable[[], Tensor] | None = None

        def __post_init__(self) -> None:
            # What looks at every field then must not ask for the logits.
            make, self.make_logits = self.make_logits, None
            post_init = getattr(super(), "__post_init__", None)
            if post_init is not None:
                post_init()
            if make is not None:
                self.make_logits = make
                if isinstance(self, dict):  # a copy is made of its items
                    self["make_logits"] = make

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name != "logits" or value is not None:
                return value
            make = super().__getattribute__("make_logits")
            if make is not None:
                value = make()
                self.logits = value
            return value

        def __getitem__(self, key: Any) -> Any:
            if key == "logits":
                return self.logits
            return super().__getitem__(key)

        def to_tuple(self) -> tuple[Any, ...]:
            """Its values that are not None, the logits among them."""
            found = {"loss": self.loss, "logits": self.logits, **self}
            found.pop("make_logits", None)
            return tuple(value for value in found.values() if value is not None)

    return DeferredLogits


def tied_product(model: Any, x: Tensor, weight: Any) -> Tensor:
    """x times the embedding's weight, by the plan's routines."""
    if type(weight) is not nn.Parameter or not plain_tensor(x):
        return F.linear(x, weight)
    return model._fused.products(x, weight)


def fused_loss(
    model: Any, hidden: Tensor, targets: Tensor, weight: Tensor | None, **options: Any
) -> Tensor | None:
    """The loss of hidden [..., d] without logits, float32; None if it has to be made of them."""
    if unusual() or weight is None or not takes_norm(hidden, weight):
        return None
    if torch.is_grad_enabled() and weight.requires_grad:
        forget(weight)
    backend = model._fused.backend
    return ops.linear_cross_entropy(hidden, weight, targets, backend=backend, **options)


class FusedHuggingFaceBody(Fused):
    """What holds the layers in Apple's Hugging Face code."""

    _fused: BodyState
    keeps_name = True

    def _update_causal_mask(self, attention_mask: Tensor | None, input_tensor: Tensor) -> Any:
        own: Any = super()
        return self._fused.masks.of(self, own._update_causal_mask, attention_mask, input_tensor)


class FusedHuggingFaceModel(Fused):
    """Body, head and loss of Apple's Hugging Face code."""

    _fused: ModelState
    keeps_name = True
    config: Any
    transformer: Any
    lm_head: nn.Module | None

    @while_fused
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        *more: Any,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> Any:
        """more: the last three by position."""
        config = self.config
        if more:
            named: tuple[Any, ...] = (output_hidden_states, return_dict, cache_position)[
                len(more) :
            ]
            output_hidden_states, return_dict, cache_position = *more, *named
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "output_attentions": _either(output_attentions, config.output_attentions),
            "output_hidden_states": _either(output_hidden_states, config.output_hidden_states),
            "return_dict": _either(return_dict, config.use_return_dict),
            "cache_position": cache_position,
        }
        if torch.compiler.is_compiling():
            return super().forward(labels=labels, **given)
        outputs = self.transformer(**given)
        hidden = outputs[0]
        if labels is not None and given["return_dict"]:
            loss = _loss(self, hidden, labels)
            if loss is not None:
                make = {"make_logits": lambda: _logits(self, hidden)}
                return _output(deferring(self._fused.output), outputs, loss=loss, **make)
        logits, loss = _logits(self, hidden), None
        if labels is not None:
            rows = logits[..., :-1, :].contiguous().view(-1, config.vocab_size)
            loss = F.cross_entropy(rows, labels[..., 1:].contiguous().view(-1).to(rows.device))
        if not given["return_dict"]:
            rest = (logits, *outputs[1:])
            return rest if loss is None else (loss, *rest)
        return _output(self._fused.output, outputs, loss=loss, logits=logits)


def _either(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _output(kind: Any, outputs: Any, **values: Any) -> Any:
    """A model's output, with what its body's has."""
    kept = ("past_key_values", "hidden_states", "attentions")
    return kind(**values, **{name: getattr(outputs, name) for name in kept})


def _logits(model: Any, hidden: Tensor) -> Tensor:
    if model.lm_head is None:
        logits = tied_product(model, hidden, model.transformer.token_embeddings.weight)
    else:
        logits = model.lm_head(hidden)
    return logits[:, : model.config.vocab_size]  # of positions, as the own forward does


def _loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor | None:
    """The loss of labels without logits, in the dtype that they would have given it; None if it has
    to be made of them.
    """
    length, vocabulary = hidden.shape[1], model.config.vocab_size
    if not torch.is_grad_enabled() or labels.shape != hidden.shape[:2] or length > vocabulary:
        return None
    weight: Any = model.lm_head
    weight = model.transformer.token_embeddings if weight is None else weight
    weight = weight.weight if isinstance(weight, nn.Embedding) else plain_weight(weight)
    if weight is None or weight.shape[0] != vocabulary:
        return None
    targets = labels[:, 1:].to(hidden.device)
    how = {"ignore_index": _IGNORED, "reduction": "sum"}
    loss = fused_loss(model, hidden[:, :-1], targets, weight, **how)
    if loss is None:
        return None
    loss = loss / (targets != _IGNORED).sum()  # not a number if none counts, as of logits
    return loss if autocast_dtype(hidden.device.type) else loss.to(hidden.dtype)


class FusedCoreNetModel(Fused):
    """CoreNet's language model."""

    _fused: ModelState
    keeps_name = True
    token_embeddings: Any
    layers: Any
    norm: nn.Module
    classifier: nn.Module | None

    @while_fused
    def forward(self, model_input: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.classifier is not None:
            return super().forward(model_input, *args, **kwargs)
        hidden, cached = _corenet_body(self, model_input, *args, **kwargs)
        logits = tied_product(self, hidden, self.token_embeddings.weight)
        return logits if cached is None else {"logits": logits, **cached}

    def loss(self, input_ids: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """The loss of predicting targets at every position, without logits in memory.

        Args:
            input_ids: integers [batch, length].
            targets: int64 [batch, length].
            options: of `elmkernels.linear_cross_entropy`: z_loss, label_smoothing, ignore_index,
                reduction.

        Returns:
            float32, one number, or with reduction "none" [batch, length].
        """
        hidden, _ = _corenet_body(self, input_ids)
        classifier = self.classifier
        tied = self.token_embeddings.weight
        weight = tied if classifier is None else plain_weight(classifier)
        loss = fused_loss(self, hidden, targets, weight, **options)
        if loss is not None:
            return loss
        logits = F.linear(hidden, tied) if classifier is None else classifier(hidden)
        return cross_entropy(logits, targets, **options)


def _corenet_body(
    model: Any, model_input: Any, *flags: Any, **named: Any
) -> tuple[Tensor, dict[str, Any] | None]:
    """Hidden states after the last norm, and the cache in CoreNet's dict if it is to be kept."""
    layers = model.layers
    if isinstance(model_input, dict):
        ids, keep = model_input["input_ids"], model_input["use_kv_cache"]
        keys, values = model_input["past_keys"], model_input["past_values"]
        causal = model_input["is_causal"]
    else:
        ids, keys, values, keep, causal = model_input, None, None, False, True
    keys = [None] * len(layers) if keys is None else keys
    values = [None] * len(layers) if values is None else values
    x = model.token_embeddings(ids)
    for i, layer in enumerate(layers):
        x, keys[i], values[i] = layer(x, keys[i], values[i], keep, causal, *flags, **named)
    return model.norm(x), {"past_keys": keys, "past_values": values} if keep else None
