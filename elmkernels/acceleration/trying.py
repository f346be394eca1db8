"""Whether a module computes what a kernel does: by its parts, then by trying it.

Tried is the forward of the module's own class, so that no hook is called. Of a whole model it is
called on what only stands for a model, so that no module of it is called either.
"""

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.random import fork_rng

from .. import reference
from ..backends import Reason
from ..checks import DTYPES
from ..openelm import layers
from ..openelm.compressed import Compressed
from ..surgery import missing_own, missing_plain, plain_tensor
from .classes import Fused, own_class
from .masks import causal_like
from .models import ModelState
from .projections import Products
from .routines import Plan

_APART = ("__init__", "extra_repr")  # methods that compute nothing of a forward


def own_forward(module: nn.Module, *args: Any) -> Any:
    """The forward of a module's own class, without hooks and without gradients."""
    kind = getattr(module, "weight", None)
    device = kind.device.type if isinstance(kind, Tensor) else "cpu"
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return own_class(type(module)).forward(module, *args)


def _random(width: int, like: Tensor) -> Tensor:
    return torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(like)


def missing_alone(module: nn.Module) -> Reason | None:
    """Why a module may be more than its own class: it wraps others, or answers for them."""
    if any(True for _ in module.children()):
        return f"{type(module).__name__} wraps other modules"
    if type(module).__getattr__ is not nn.Module.__getattr__:
        return f"{type(module).__name__} answers for another module"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{type(module).__name__} is called in a way of its own"
    return None


def missing_norm(norm: nn.Module) -> Reason | None:
    """Why a module is no RMSNorm as the reference computes it."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return "it has no 1-dimensional weight"
    eps = getattr(norm, "eps", None)
    if not isinstance(eps, float):
        return "it has no eps"
    if getattr(norm, "bias", None) is not None:
        return "it has a bias"
    if weight.device.type == "meta" or missing_own(norm):
        return None
    x = _random(weight.shape[0], weight)
    got, expected = own_forward(norm, x), reference.rms_norm(x, weight, eps)
    if got.shape != expected.shape or not torch.allclose(
        got.float(), expected.float(), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6
    ):
        return "its output is not RMSNorm's"
    return None


def missing_linear(module: nn.Module) -> Reason | None:
    """Why a module is neither nn.Linear nor a class of its own (CoreNet has one) that does the same
    with its parts. A subclass of nn.Linear does something else on purpose (an adapter).
    """
    if isinstance(module, Compressed):
        return None
    kind, weight = own_class(type(module)), getattr(module, "weight", None)
    if reason := missing_own(module):
        return reason
    if kind is nn.Linear:
        computed = not isinstance(weight, nn.Parameter)
        return "its weight is computed, not a Parameter" if computed else None
    other = f"{kind.__name__} is not nn.Linear"
    parts = {name for name, _ in module.named_parameters()}
    if issubclass(kind, nn.Linear) or not parts <= {"weight", "bias"}:
        return other
    if missing_alone(module) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return other
    if weight.device.type == "meta":
        return other
    x = _random(weight.shape[1], weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        expected = F.linear(x, weight, getattr(module, "bias", None))
    return None if torch.equal(own_forward(module, x), expected) else other


def missing_silu(activation: nn.Module) -> Reason | None:
    """Why a module is no SiLU."""
    x = torch.linspace(-6, 6, 97)
    if torch.allclose(own_forward(activation, x), F.silu(x), atol=1e-6):
        return None
    return "its activation is not SiLU"


def missing_class(module: nn.Module, known: type[nn.Module] | None) -> Reason | None:
    """Why a module's class computes another thing than a class that is known; of other code (None)
    only how it is called can be told.
    """
    kind = own_class(type(module))
    if kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl:
        return f"{kind.__name__} is called in a way of its own"
    if known is None:
        return None
    if not issubclass(kind, known):
        return f"{kind.__name__} is not {known.__name__}"
    names = [n for n, f in vars(known).items() if inspect.isfunction(f) and n not in _APART]
    for name in names:
        if getattr(kind, name) is not getattr(known, name):
            return f"{kind.__name__} has a {name} of its own"
    return None


def missing_room(module: nn.Module, kind: type[Fused]) -> Reason | None:
    """Why a fused class can't stand before a class of others' code: it would hide a name of it."""
    if any(cls.__module__ == layers.__name__ for cls in own_class(type(module)).__mro__):
        return None
    for cls in kind.__mro__[: kind.__mro__.index(Fused)]:
        for name in vars(cls).keys() - vars(nn.Module).keys():
            if name.startswith("__"):
                continue
            if name in vars(module) or hasattr(own_class(type(module)), name):
                return f"its own `{name}` would be hidden"
    return None


def given_by(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module's class as it is now gives for x; None if that can't be tried without a trace:
    something hangs on a module in it, or it takes more than x.
    """
    if any(missing_plain(m) for m in module.modules()):
        return None
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), fork_rng(devices=[]):
            given = type(module).forward(module, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    given = given[0] if isinstance(given, tuple) and given else given
    return given if isinstance(given, Tensor) else None


def missing_likeness(own: Tensor | None, fused: Tensor | None) -> Reason | None:
    """Why a fused class isn't the same as a module's own, by what both gave; None if it is, or if
    one couldn't be tried.
    """
    if own is None or fused is None:
        return None
    if own.shape == fused.shape:
        # Of one value of the output: products and sums may be taken in any order.
        allowed = (8 * torch.finfo(own.dtype).eps + 1e-5) * own.abs().max()
        if (own.double() - fused.double()).abs().max() <= allowed:
            return None
    return "its output is not that of OpenELM's"


def sample(norm: nn.Module) -> Tensor | None:
    """Three tokens to try modules with, as a norm takes them; None if it has no numbers."""
    weight = getattr(norm, "weight", None)
    if not plain_tensor(weight) or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, weight.shape[0], generator=generator).to(weight)


def missing_masks(body: nn.Module) -> Reason | None:
    """Why a body's masks aren't causal ones, with what is padding left out."""
    own, buffer = own_class(type(body)), body._buffers.get("causal_mask")
    make, norm = getattr(own, "_update_causal_mask", None), getattr(body, "norm", None)
    weight = getattr(norm, "weight", None)
    if make is None or buffer is None or getattr(body, "config", None) is None:
        return "it makes no mask that could be kept"
    if [*inspect.signature(make).parameters] != ["self", "attention_mask", "input_tensor"]:
        return f"its {make.__name__} takes something else than a mask and embeddings"
    if buffer.is_meta or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    x = torch.zeros(1, 3, weight.shape[0], dtype=weight.dtype, device=buffer.device)
    ones = torch.ones(1, 3, dtype=torch.long, device=buffer.device)
    n, lowest = buffer.shape[-1], torch.finfo(x.dtype).min
    causal = causal_like(x.new_empty(1, 1, n, n))
    padded = ones.clone()
    padded[0, 1] = 0
    other = causal.clone()
    other[1:, 1:2] = lowest
    try:
        # In order: masks without padding; masks of equal padding, whatever their length.
        given = [make(body, mask, x) for mask in (None, ones, padded, padded[:, :2])]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return "its mask can't be tried"
    for got, expected in zip(given, (causal, causal, other, other), strict=True):
        if not isinstance(got, Tensor) or got.shape != (1, 1, n, n) or got.dtype != x.dtype:
            return "its mask is none of [batch, 1, n, n]"
        if not torch.equal(got[0, 0], expected):
            return "its mask is not the causal one"
    return None


# forward's class and the class of outputs -> what it gave, and what it called its parts with.
Call = Callable[[Any, type | None], list[Any]]
_VOCABULARY, _WIDTH, _IGNORED = 11, 4, -100


def missing_model(model: nn.Module, kind: Any, alone: bool) -> tuple[Reason | None, type | None]:
    """Why a fused class computes another thing than a model's own forward; and the class of what
    that returns, if it is one of its own. alone: whether the layers are the model's own, as
    CoreNet's are.
    """
    own: Any = own_class(type(model))
    names = [*inspect.signature(own.forward).parameters][1:]
    known = inspect.signature(kind.forward).parameters.values()
    if not alone and names != [p.name for p in known if p.kind is not p.VAR_POSITIONAL][1:]:
        return f"its forward takes ({', '.join(names)})", None
    output: type | None = None
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            for call in _corenet() if alone else _hugging_face():
                expected = call(own, None)
                output = output or _class_of(expected[0])
                if not _alike(expected, call(kind, output)):
                    return "its output is not that of its body, head and loss", None
    except Exception as error:  # whatever others' code raises on what is no model
        return f"its forward can't be tried alone ({type(error).__name__})", None
    return None, output


def _class_of(output: object) -> type | None:
    return type(output) if hasattr(output, "logits") else None


def _alike(a: Any, b: Any) -> bool:
    """Whether what two forwards gave is the same."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if type(a) is not type(b) and not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-4, 1e-5)
    if hasattr(a, "logits"):
        names = ("loss", "logits", "past_key_values", "hidden_states", "attentions")
        return all(_alike(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b or a == b


def _numbers(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _embedding() -> nn.Embedding:
    return nn.Embedding(_VOCABULARY, _WIDTH, _weight=_numbers(_VOCABULARY, _WIDTH))


def _state(output: type | None) -> ModelState:
    return ModelState(None, Products(Plan()), output)


class _Outputs(tuple):
    """What a body returns, as transformers' outputs are read."""

    last_hidden_state = property(lambda self: self[0])
    past_key_values = property(lambda self: self[1])
    hidden_states = property(lambda self: self[2])
    attentions = property(lambda self: self[3])


def _hugging_face() -> Iterator[Call]:
    for tied in (True, False):
        yield _hugging_face_call(tied, False, None, False)
        for labels in (torch.tensor([[1, 2, 3], [4, _IGNORED, 6]]), None):
            for grad in (True, False):
                yield _hugging_face_call(tied, True, labels, grad)


def _hugging_face_call(tied: bool, as_dict: bool, labels: Tensor | None, grad: bool) -> Call:
    marks = {name: name for name in (
        "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds",
        "use_cache", "output_attentions", "output_hidden_states", "cache_position",
    )}  # fmt: skip
    outputs = _Outputs((_numbers(2, 3, _WIDTH), "cache", "states", "attentions"))
    head = None
    if not tied:
        head = nn.Linear(_WIDTH, _VOCABULARY, bias=False, device="meta")
        head.weight = nn.Parameter(_numbers(_VOCABULARY, _WIDTH))

    def call(kind: Any, output: type | None) -> list[Any]:
        given: dict[str, Any] = {}
        embedding = _embedding()

        def body(**arguments: Any) -> _Outputs:
            given.update(arguments)
            return outputs

        body.token_embeddings = embedding  # pyright: ignore[reportFunctionMemberAccess]
        config = SimpleNamespace(
            vocab_size=_VOCABULARY, output_attentions=False, output_hidden_states=False,
            use_return_dict=True,
        )  # fmt: skip
        model = SimpleNamespace(
            config=config, transformer=body, lm_head=head, vocab_size=_VOCABULARY,
            _fused=_state(output),
        )  # fmt: skip
        with torch.set_grad_enabled(grad):
            return [kind.forward(model, **marks, labels=labels, return_dict=as_dict), given]

    return call


def _corenet() -> Iterator[Call]:
    ids = torch.tensor([[1, 2, 3]])
    yield _corenet_call(lambda: ids)
    for past in (None, ["first", "second"]):
        for keep in (True, False):
            yield _corenet_call(
                lambda past=past, keep=keep: {
                    "input_ids": ids, "past_keys": past and [*past], "use_kv_cache": keep,
                    "past_values": past and [*past], "is_causal": past is None,
                }
            )  # fmt: skip


def _corenet_call(make: Callable[[], Any]) -> Call:
    def call(kind: Any, output: type | None) -> list[Any]:
        given: list[Any] = []

        def layer(
            x: Tensor, k: Any = None, v: Any = None, keep: bool = False, causal: bool = True,
            *rest: Any,
        ) -> Any:  # fmt: skip
            # What older code doesn't pass on is what newer code takes for granted.
            given.append((k, v, keep, causal, rest or (True, False, True)))
            return 2 * x + 1, (k, "k"), (v, "v")

        model = SimpleNamespace(
            token_embeddings=_embedding(), layers=[layer, layer], num_transformer_layers=2,
            norm=lambda x: x - 0.5, classifier=None, _fused=_state(output),
        )  # fmt: skip
        with torch.no_grad():
            return [kind.forward(model, make()), given]

    return call


def missing_dtype(body: nn.Module) -> Reason | None:
    """Why the kernels can't compute in the dtypes of a model's weights. body: what holds its
    layers, norm and embedding.
    """
    for name, weight in body.named_parameters():
        known = name.startswith(("layers.", "norm.", "token_embeddings."))
        if known and weight.is_floating_point() and weight.dtype not in DTYPES:
            return f"`{name}` is {weight.dtype}, the kernels take {', '.join(map(str, DTYPES))}"
    return None


def missing_part(module: nn.Module, known: set[str]) -> Reason | None:
    """What a module has beside the known parts of its kind, unless that does nothing."""
    for child, held in module._modules.items():
        nothing = isinstance(held, nn.Identity) or (isinstance(held, nn.Dropout) and held.p == 0)
        if held is not None and child not in known and not nothing:
            return f"it has another part, {child} ({type(held).__name__})"
    return None
