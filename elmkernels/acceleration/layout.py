"""Which models `accelerate` knows: by the layout of their modules and by trying them, not by class.

`layers[i].attn` with qkv_proj, out_proj, q_norm, k_norm; `.ffn` with proj_1, proj_2; attn_norm,
ffn_norm; norm; token_embeddings, in a model or in what a wrapper holds. Wrappers round modules
(checkpointing, torch.compile, FSDP, adapters) are looked through. Nothing is changed here.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from ..backends import Reason
from ..openelm import layers
from ..openelm.compressed import Compressed, weight_of
from ..openelm.loss import LossHead
from ..openelm.model import OpenELM
from ..surgery import missing_own, missing_plain
from . import foreign, fused, models
from .classes import own_class
from .trying import (
    missing_alone,
    missing_class,
    missing_dtype,
    missing_linear,
    missing_masks,
    missing_model,
    missing_norm,
    missing_part,
    missing_room,
    missing_silu,
)

PROJECTIONS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
NORMS = ("attn_norm", "ffn_norm", "attn.q_norm", "attn.k_norm")
BLOCKS = ("", "attn", "ffn")
OUTPUTS = ("classifier", "lm_head")  # projections to logits that are modules


@dataclass(frozen=True)
class Convention:
    """How one family of models calls its modules. own: the classes of its layer, attention and
    feed-forward network; None for a family whose classes are others' code.
    """

    name: str
    mark: str  # a parameter of its attention's forward that no other family has
    attention: type[fused.AttentionParts]
    layer: type[fused.LayerParts]
    own: dict[str, type[nn.Module]] | None = None
    masked: bool = False  # its models give every attention a mask
    body: type[models.FusedHuggingFaceBody] | None = None
    model: type[fused.Fused] | None = None

    @property
    def foreign(self) -> bool:
        """Whether its classes are others' code."""
        return self.own is None


OURS = {"": layers.DecoderLayer, "attn": layers.Attention, "ffn": layers.FeedForward}
CONVENTIONS = (
    Convention("elmkernels", "context", fused.FusedAttention, fused.FusedDecoderLayer, OURS),
    Convention(
        "CoreNet",
        "past_keys",
        foreign.FusedCoreNetAttention,
        foreign.FusedCoreNetLayer,
        model=models.FusedCoreNetModel,
    ),
    Convention(
        "Hugging Face",
        "past_key_value",
        foreign.FusedHuggingFaceAttention,
        foreign.FusedHuggingFaceLayer,
        masked=True,
        body=models.FusedHuggingFaceBody,
        model=models.FusedHuggingFaceModel,
    ),
)
# Children that a fused forward knows of; any other must do nothing.
_CHILDREN = {
    "": {"attn", "ffn", "attn_norm", "ffn_norm"},
    "attn": {"qkv_proj", "out_proj", "q_norm", "k_norm", "pos_embedding"},
    "ffn": {"proj_1", "proj_2", "act"},
}


def inner(module: nn.Module | None, *names: str) -> nn.Module | None:
    """What wrappers with a single child hold: the first module that has children of these names, or
    else the last one.
    """
    while module is not None and len(module._modules) == 1:
        ((name, child),) = module._modules.items()
        if name in names or name == "parametrizations" or child is None:
            break
        module = child
    return module


def base_of(module: nn.Module | None) -> nn.Module | None:
    """The projection that adapters wrap: of all plain ones inside, the only one with the most
    weights; without such a one what a wrapper holds, or the module itself.
    """
    if module is None or not module._modules:
        return module
    inside: list[Any] = [
        m for m in module.modules() if own_class(type(m)) is nn.Linear or isinstance(m, Compressed)
    ]
    sizes = [m.in_features * m.out_features for m in inside]
    if not inside or sizes.count(max(sizes)) > 1:
        return inner(module)
    return inside[sizes.index(max(sizes))]


class Block:
    """The modules of one layer, wrappers looked through. parts: {path below the layer: the module,
    or None if there is none}; wrapped: {path: the class of what a projection is inside of}.
    """

    def __init__(self, index: int, held: nn.Module) -> None:
        self.index = index
        self.wrapped: dict[str, str] = {}
        layer = inner(held, *_CHILDREN[""])
        self.parts: dict[str, Any] = {"": layer}
        for name in ("attn", "ffn"):
            self.parts[name] = inner(_child(layer, name), *_CHILDREN[name])
        for path in NORMS:
            self.parts[path] = inner(self._at(path))
        for path in PROJECTIONS:
            place = self._at(path)
            self.parts[path] = base_of(place)
            if place is not None and place is not self.parts[path]:
                kind = type(place)
                self.wrapped[path] = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"

    def _at(self, path: str) -> nn.Module | None:
        owner, _, name = path.rpartition(".")
        return _child(self.parts[owner], name)

    @property
    def gated(self) -> bool:
        """Whether the activation is SwiGLU."""
        ffn = self.parts["ffn"]
        return bool(getattr(ffn, "with_glu", getattr(ffn, "ffn_with_glu", True)))

    @property
    def heads(self) -> tuple[int, int]:
        """(q_heads, kv_heads), 0 for what the attention module doesn't say."""
        attn = self.parts["attn"]
        q = getattr(attn, "q_heads", getattr(attn, "num_q_heads", 0))
        kv = getattr(attn, "kv_heads", getattr(attn, "num_k_heads", 0))
        return q or 0, kv or 0

    def shape(self, path: str) -> tuple[int, ...] | None:
        """Of a projection's weight, if it tells."""
        weight = weight_of(self.parts[path]) if hasattr(self.parts[path], "weight") else None
        return None if weight is None or len(weight.shape) != 2 else tuple(weight.shape)


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    return None if module is None else module._modules.get(name)


@dataclass
class Layout:
    """What was found in a model, and where. root: the model itself, inside of what may wrap it;
    body: what holds the layers; names: of every module, by its id; left: {path: why it stays};
    output: the class of what the model's forward returns, if it is others' code.
    """

    model: nn.Module
    root: Any
    body: Any
    names: dict[int, str]
    convention: Convention = CONVENTIONS[0]
    blocks: list[Block] = field(default_factory=list)
    left: dict[str, Reason] = field(default_factory=dict)
    output: type | None = None

    def path(self, module: nn.Module) -> str:
        """The module's name in the model that was given."""
        return self.names[id(module)]

    def leave(self, module: nn.Module, reason: Reason | None) -> None:
        """Note why a module stays as it is, if there is a reason."""
        if reason is not None:
            self.left.setdefault(self.path(module), reason)

    def takes(self, module: nn.Module) -> bool:
        """Whether nothing speaks against a fused class for it."""
        return self.path(module) not in self.left

    def norm(self) -> Any:
        """The last norm."""
        return inner(self.body.norm)

    @property
    def whole(self) -> Any:
        """What has body, head and loss; None for a body alone."""
        apart = self.convention.body is not None
        return self.body if not apart else None if self.root is self.body else self.root

    def heads(self) -> dict[str, nn.Module]:
        """What makes logits and losses, by its name in the model."""
        names = (*OUTPUTS, "tied_head", "logits_head", "loss_head")
        held = {n: _child(self.root, n) for n in names}
        found = {n: base_of(m) if n in OUTPUTS else inner(m) for n, m in held.items()}
        return {name: module for name, module in found.items() if module is not None}

    def parts(self) -> list[nn.Module]:
        """Every module that a forward may pass over or a kernel reads, once."""
        own = [part for block in self.blocks for part in block.parts.values()]
        own += [self.norm(), self.body.token_embeddings, *self.heads().values()]
        return list({id(m): m for m in own if m is not None}.values())

    def called(self) -> Iterator[tuple[str, Reason]]:
        """Modules that a shortcut could pass over, but something hangs on them now."""
        for module in self.parts():
            reason = missing_plain(module)
            if reason is not None and self.takes(module):
                yield self.path(module), f"{reason}: no shortcut goes past it"


def wrapped_in(layout: Layout) -> dict[str, int]:
    """What projections are inside of, such as an adapter's class, and how many of them."""
    return dict(Counter(kind for block in layout.blocks for kind in block.wrapped.values()))


def blocks_of(model: nn.Module) -> Layout:
    """A model's layers, without a look at what they are. Raises ValueError as `found_in`."""
    layout = found_in(model)
    layout.blocks = [Block(i, held) for i, held in enumerate(layout.body.layers)]
    return layout


def _refuse(model: nn.Module, reason: Reason) -> NoReturn:
    raise ValueError(f"model ({type(model).__name__}) is not an OpenELM this can swap: {reason}")


def native(model: Any) -> Any:
    """The model of this package that another class wraps as its `transformer`, else the model."""
    wrapped = getattr(model, "transformer", None)
    return wrapped if isinstance(wrapped, OpenELM) else model


def found_in(model: nn.Module) -> Layout:
    """The model inside of what may wrap it. Raises ValueError if there is none or more than one."""
    names = {id(m): name for name, m in reversed([*model.named_modules()])}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        held = module._modules.get("layers")
        if isinstance(held, nn.ModuleList) and len(held):
            found[name] = module
    if not found:
        _refuse(model, "it has no `layers` (nor `transformer.layers`)")
    if len(found) > 1:
        _refuse(model, f"it holds several models, {', '.join(found)}: give one of them")
    ((name, body),) = found.items()
    parent, _, own = name.rpartition(".")
    whole = own != "transformer" or isinstance(body, OpenELM)
    root = body if whole else model.get_submodule(parent)
    return Layout(model, root, body, names)


def examine(model: nn.Module) -> Layout:
    """Check the whole layout; nothing is changed. Raises ValueError, with the reason, for a model
    that isn't known.
    """
    layout = blocks_of(model)
    body, prefix = layout.body, layout.names[id(layout.body)]
    prefix = f"{prefix}." if prefix else ""
    for name in ("norm", "token_embeddings"):
        if _child(body, name) is None:
            _refuse(model, f"it has no `{prefix}{name}`")
    for block in layout.blocks:
        _check_parts(model, block, f"{prefix}layers.{block.index}")
    attentions = [b.parts["attn"] for b in layout.blocks]
    layout.convention = _convention(model, attentions[0])
    for block in layout.blocks:
        where = f"{prefix}layers.{block.index}"
        if _convention(model, block.parts["attn"]) is not layout.convention:
            _refuse(model, f"`{where}.attn` is called in another way than the layers before")
        _check_block(layout, block, where)
    _examine_norm(layout, layout.norm(), f"{prefix}norm")
    if reason := missing_dtype(body):
        _refuse(model, reason)
    for name, head in layout.heads().items():
        _examine_head(layout, name, head)
    _examine_whole(layout)
    return layout


def _check_parts(model: nn.Module, block: Block, where: str) -> None:
    for path in (*PROJECTIONS, "attn_norm", "ffn_norm"):
        if block.parts[path] is None:
            _refuse(model, f"it has no `{where}.{path}`")


def _convention(model: nn.Module, attn: nn.Module) -> Convention:
    kind = own_class(type(attn))
    parameters = inspect.signature(kind.forward).parameters
    for cls in kind.__mro__:  # a subclass may take (*args, **kwargs)
        taken = inspect.signature(cls.forward).parameters if "forward" in vars(cls) else ()
        found = next((c for c in CONVENTIONS if c.mark in taken), None)
        if found is not None:
            return found
    marks = ", ".join(c.mark for c in CONVENTIONS)
    _refuse(model, f"its attention's forward takes ({', '.join(parameters)}), none of {marks}")


def _check_block(layout: Layout, block: Block, where: str) -> None:
    model, parts, convention = layout.model, block.parts, layout.convention
    attn = parts["attn"]
    if not hasattr(attn, "q_norm") or not hasattr(attn, "k_norm"):
        _refuse(model, f"`{where}.attn` has no q_norm and k_norm (None for no QK norm)")
    if reason := _missing_heads(block):
        _refuse(model, f"`{where}.attn`: {reason}")
    rotary = getattr(attn, "pos_embedding", None)
    if convention.foreign and not (
        hasattr(rotary, "freq_constant") and hasattr(rotary, "max_seq_length")
    ):
        _refuse(model, f"`{where}.attn.pos_embedding` has no freq_constant and max_seq_length")
    for path in NORMS:
        if parts[path] is not None:
            _examine_norm(layout, parts[path], f"{where}.{path}")
    layout.leave(parts["ffn"], _missing_ffn(block))
    kinds = {"": convention.layer, "attn": convention.attention, "ffn": fused.FusedFeedForward}
    for name in BLOCKS:
        part = parts[name]
        known = None if convention.own is None else convention.own[name]
        layout.leave(part, missing_own(part) or missing_class(part, known))
        layout.leave(part, missing_part(part, _CHILDREN[name]) or missing_room(part, kinds[name]))
    for path in PROJECTIONS:
        layout.leave(parts[path], missing_linear(parts[path]))


def _examine_norm(layout: Layout, norm: nn.Module, where: str) -> None:
    reason = missing_own(norm) or missing_alone(norm) or missing_room(norm, fused.FusedRMSNorm)
    if reason is None and (other := missing_norm(norm)):
        _refuse(layout.model, f"`{where}`: {other}")
    layout.leave(norm, reason)


def _examine_head(layout: Layout, name: str, head: nn.Module) -> None:
    own = {
        "tied_head": layers.TiedHead, "logits_head": layers.LogitsHead,
        "loss_head": LossHead,
    }  # fmt: skip
    if name in OUTPUTS:
        layout.leave(head, missing_linear(head))
    else:
        layout.leave(head, missing_own(head) or missing_class(head, own[name]))


def _examine_whole(layout: Layout) -> None:
    """What stands round the layers of others' code: a body that makes masks, a model."""
    body, whole, convention = layout.body, layout.whole, layout.convention
    if convention.body is not None:
        layout.leave(body, missing_own(body) or missing_masks(body))
    if convention.model is None or whole is None:
        return
    reason = missing_own(whole) or missing_class(whole, None)
    reason = reason or missing_room(whole, convention.model)
    if reason is None:
        reason, layout.output = missing_model(whole, convention.model, whole is body)
    layout.leave(whole, reason)


def _missing_heads(block: Block) -> Reason | None:
    """Why the heads of an attention module make no sense."""
    (q, kv), head_dim = block.heads, getattr(block.parts["attn"], "head_dim", None)
    if not q or not kv or not head_dim:
        return "it doesn't say how many heads it has"
    shape = block.shape("attn.qkv_proj")
    if shape is not None and shape[0] != (q + 2 * kv) * head_dim:
        return f"qkv_proj gives {shape[0]} columns for {q} + 2 x {kv} heads of {head_dim}"
    return None


def _missing_ffn(block: Block) -> Reason | None:
    """Why a feed-forward network is none that the fused one computes."""
    activation = _child(block.parts["ffn"], "act")
    if activation is not None and (reason := missing_silu(activation)):
        return reason
    first, second = block.shape("ffn.proj_1"), block.shape("ffn.proj_2")
    if first and second and first[0] != second[1] * (2 if block.gated else 1):
        return f"proj_1 gives {first[0]} columns, proj_2 takes {second[1]}"
    return None
