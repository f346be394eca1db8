"""A model's weights as data for `ops.decode_step`, which runs all layers in one call."""

from collections.abc import Iterator
from operator import contains, getitem, is_
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..openelm import layers as reference
from ..openelm.model import OpenELM
from ..surgery import GLOBAL_HOOKS, HOOKS, as_made, methods_of, plain, rounding_of, untouched
from ..weights.formats import DecoderWeights, Form, Layer, Weight, is_compressed
from .projections import Linear


def decoder_weights_of(model: OpenELM) -> DecoderWeights:
    """The weights, head counts and rotary table of a model, accelerated or not, without a copy.

    A module with a method `compressed()` is asked for its compressed form first (None: it
    has none). The same object is returned until the model changes.

    Args:
        model: an `elmkernels.OpenELM`.

    Returns:
        What `ops.decode_step` takes; its tensors are the model's own.

    Raises:
        ValueError: the model computes more than its weights say (adapters, hooks, foreign
            modules); the message names the first such module.

    Example:
        >>> weights = decoder_weights_of(model)
        >>> with torch.no_grad():
        ...     logits = elmkernels.decode_step(weights, tokens, cache.lengths, cache.arena)
    """
    return snapshot_of(model).weights


class Snapshot:
    """The decoder weights of a model, and what must still hold for them to describe it: every
    module, parameter and buffer in its place, of its class and at its address, in its strides,
    every eps, every method, and no hook anywhere.
    """

    def __init__(self, model: OpenELM) -> None:
        self.weights = _describe(model)
        self.dtypes = {w.dtype for w in _tensors(self.weights)}
        self.compressed = any(map(is_compressed, _tensors(self.weights)))
        # Not the model itself: what is kept here must not keep it.
        modules = [m for m in model.modules() if m is not model]
        places = [
            (owner, name, value)
            for m in (model, *modules)
            for owner in (m._modules, m._parameters, m._buffers)
            for name, value in owner.items()
        ]
        # In columns, so that holds() runs in C: it is asked for every token.
        self._owners, self._names, self._values = map(list, zip(*places, strict=True))
        self._tensors = [v for v in self._values if isinstance(v, Tensor)]
        self._tensors.append(model.rope_table)
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._strides = list(map(Tensor.stride, self._tensors))
        self._dtypes = [t.dtype for t in self._tensors]
        self._modules = modules
        self._types = [type(m) for m in modules]
        self._attributes = [vars(m) for m in (model, *modules)]
        self._attentions = [a for a in self._attributes if "layer_index" in a]
        self._indices = [a["layer_index"] for a in self._attentions]
        self._embedding = vars(model.token_embeddings)
        self._epsilons = [a for a in self._attributes if "eps" in a]
        self._kinds = set(map(type, (model, *modules)))
        own = [(vars(m), name) for m in (model, *modules) for name in _replaceable(m)]
        self._owned, self._own_names = map(list, zip(*own, strict=True))
        self._children = [m._modules for m in (model, *modules)]
        self._counts = list(map(len, self._children))
        self._hooks = [vars(m)[name] for m in (model, *modules) for name in HOOKS]
        self._hooks += GLOBAL_HOOKS

    def holds(self) -> bool:
        """Whether the model is still what it was."""
        try:
            places = all(map(is_, map(getitem, self._owners, self._names), self._values))
        except KeyError:
            return False
        return (
            places
            and list(map(len, self._children)) == self._counts
            and not any(self._hooks)
            and not any(map(contains, self._owned, self._own_names))
            and all(map(as_made, self._kinds))
            and list(map(type, self._modules)) == self._types
            and all(a.get("eps") == self.weights.eps for a in self._epsilons)
            and [t.data_ptr() for t in self._tensors] == self._addresses
            and [t.dtype for t in self._tensors] == self._dtypes
            and list(map(Tensor.stride, self._tensors)) == self._strides
            and self._attributes[0]["rope_table"] is self.weights.rope_table
            and rounding_of(self._attributes[0]) == self.weights.activations
            and [a.get("layer_index") for a in self._attentions] == self._indices
            and self._embedding.get("max_norm") is None
        )


# Weak keys: a snapshot must not keep its model, nor must a copy of the model carry it along.
_KNOWN: WeakKeyDictionary[OpenELM, Snapshot] = WeakKeyDictionary()


def snapshot_of(model: OpenELM) -> Snapshot:
    """The snapshot of a model as it is now. Raises ValueError as `decoder_weights_of` does."""
    known = _KNOWN.get(model)
    if known is None or not known.holds():
        known = _KNOWN[model] = Snapshot(model)
    return known


def forget_snapshot(model: nn.Module) -> None:
    """Let go of a model's weights: it is about to hold them otherwise."""
    _KNOWN.pop(model, None)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _replaceable(module: nn.Module) -> set[str]:
    """What a module has of its own if somebody has replaced what it computes."""
    return {"forward", "_compiled_call_impl", *(name for _, name, _ in methods_of(type(module)))}


def _refuse(path: str, reason: str) -> NoReturn:
    raise ValueError(f"the model can't be described by its weights: {path} {reason}")


def _plain(path: str, module: nn.Module | None, kind: type[nn.Module]) -> None:
    """The module is of this very class or its fused one, and computes what the class says."""
    if module is None or not isinstance(module, kind):
        _refuse(path, f"must be {kind.__name__}, got {type(module).__name__}")
    _untouched(path, module)
    if not plain(module):
        _refuse(path, f"must be {kind.__name__}, got {type(module).__name__}")


def _untouched(path: str, module: nn.Module) -> None:
    if not untouched(module):
        _refuse(path, "has hooks or a forward of its own")


def _norm(path: str, module: Any, eps: float) -> Tensor:
    _plain(path, module, reference.RMSNorm)
    if module.eps != eps:
        _refuse(path, f"must have the eps of the others, {eps}, got {module.eps}")
    return _straight(path, module.weight)


def _compressed(path: str, module: Any) -> Any:
    method = getattr(module, "compressed", None)
    if method is None:
        return None
    _untouched(path, module)
    weight = method()
    if weight is not None and not is_compressed(weight):
        _refuse(path, f"gives {type(weight).__name__} as compressed()")
    return weight


def _matrix(path: str, module: Any, kind: type[nn.Module] = nn.Linear) -> Weight:
    weight = _compressed(path, module)
    if weight is not None:
        return weight
    if isinstance(module, Linear) and module.products.alone:
        _refuse(path, "holds its weight prepacked alone")
    if not hasattr(module, "compressed"):
        _plain(path, module, kind)
    if getattr(module, "bias", None) is not None:
        _refuse(path, "has a bias")
    return _straight(path, module.weight)


def _straight(path: str, weight: Tensor) -> Tensor:
    """The numbers of a row lie one after the other, as the op takes them."""
    if weight.stride(-1) != 1:
        _refuse(path, f"must have a weight of contiguous rows, got strides {weight.stride()}")
    return weight


def _describe(model: OpenELM) -> DecoderWeights:
    _plain("it", model, OpenELM)
    _plain("logits_head", model.logits_head, reference.LogitsHead)
    eps = model.norm.eps
    model._place_rope_table(model.norm.weight.device)
    layers = tuple(
        _layer(i, layer, eps, model.config.ffn_with_glu) for i, layer in enumerate(model.layers)
    )
    embedding = _matrix("token_embeddings", model.token_embeddings, nn.Embedding)
    if getattr(model.token_embeddings, "max_norm", None) is not None:
        _refuse("token_embeddings", "has a max_norm")
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        norm=_norm("norm", model.norm, eps),
        head=_head(model, embedding),
        rope_table=model.rope_table,
        head_dim=model.config.head_dim,
        gated=model.config.ffn_with_glu,
        eps=eps,
        activations=rounding_of(vars(model)),
    )


def _head(model: OpenELM, embedding: Weight) -> Weight:
    if model.classifier is not None:
        return _matrix("classifier", model.classifier)
    weight = _compressed("tied_head", model.tied_head)
    if weight is None and not hasattr(model.tied_head, "compressed"):
        _plain("tied_head", model.tied_head, reference.TiedHead)
    return embedding if weight is None else weight


def _layer(i: int, layer: Any, eps: float, gated: bool) -> Layer:
    path = f"layers.{i}"
    _plain(path, layer, reference.DecoderLayer)
    attn, ffn = layer.attn, layer.ffn
    _plain(f"{path}.attn", attn, reference.Attention)
    _plain(f"{path}.ffn", ffn, reference.FeedForward)
    if attn.layer_index != i:
        _refuse(f"{path}.attn", f"is that of layer {attn.layer_index}, whose cache it has")
    if attn.eps != eps:
        _refuse(f"{path}.attn", f"must have the eps of the others, {eps}, got {attn.eps}")
    normalized = attn.q_norm is not None
    return Layer(
        attn_norm=_norm(f"{path}.attn_norm", layer.attn_norm, eps),
        qkv_proj=_matrix(f"{path}.attn.qkv_proj", attn.qkv_proj),
        q_norm=_norm(f"{path}.attn.q_norm", attn.q_norm, eps) if normalized else None,
        k_norm=_norm(f"{path}.attn.k_norm", attn.k_norm, eps) if normalized else None,
        out_proj=_matrix(f"{path}.attn.out_proj", attn.out_proj),
        ffn_norm=_norm(f"{path}.ffn_norm", layer.ffn_norm, eps),
        proj_1=_matrix(f"{path}.ffn.proj_1", ffn.proj_1),
        proj_2=_matrix(f"{path}.ffn.proj_2", ffn.proj_2),
        q_heads=attn.q_heads,
        kv_heads=attn.kv_heads,
    )


def _tensors(weights: DecoderWeights) -> Iterator[Weight]:
    yield from (weights.embedding, weights.norm, weights.head)
    for layer in weights.layers:
        yield from (w for w in layer if isinstance(w, Tensor | Form))
