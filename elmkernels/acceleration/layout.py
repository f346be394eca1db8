"""Which models `accelerate` knows: by the layout of their modules and by trying them, not by class.

`layers[i].attn` with qkv_proj, out_proj, q_norm, k_norm; `.ffn` with proj_1, proj_2; attn_norm,
ffn_norm; norm; token_embeddings (at the top or under `transformer`). Nothing is changed here.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import reference
from ..backends import Reason
from ..openelm.compressed import weight_of
from ..openelm.surgery import has_hooks, missing_dtype
from . import fused

PROJECTIONS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")


@dataclass(frozen=True)
class Convention:
    """How one family of models calls its modules."""

    name: str
    mark: str  # a parameter of its attention's forward that no other family has
    attention: type[fused.FusedAttention]
    layer: type[fused.FusedDecoderLayer]
    foreign: bool = True


CONVENTIONS = (
    Convention("elmkernels", "context", fused.FusedAttention, fused.FusedDecoderLayer, False),
    Convention("CoreNet", "past_keys", fused.FusedCoreNetAttention, fused.FusedCoreNetLayer),
    Convention(
        "Hugging Face",
        "past_key_value",
        fused.FusedHuggingFaceAttention,
        fused.FusedHuggingFaceLayer,
    ),
)


def _refuse(model: nn.Module, reason: Reason) -> NoReturn:
    raise ValueError(f"model ({type(model).__name__}) is not an OpenELM this can swap: {reason}")


def body_of(model: nn.Module) -> tuple[Any, str]:
    """The module that holds the layers, and its prefix in the model's names. Raises ValueError for
    a model without layers.
    """
    body = model.transformer if isinstance(getattr(model, "transformer", None), nn.Module) else None
    found = next(
        (m for m in (model, body) if isinstance(getattr(m, "layers", None), nn.ModuleList)), None
    )
    if found is None or not len(found.layers):
        _refuse(model, "it has no `layers` (nor `transformer.layers`)")
    return found, "" if found is model else "transformer."


def _child(root: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def _missing_norm(norm: nn.Module | None) -> Reason | None:
    """Why a module is no RMSNorm as the reference computes it: by its parts, then by trying it."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return "it has no 1-dimensional weight"
    if not isinstance(getattr(norm, "eps", None), float):
        return "it has no eps"
    if getattr(norm, "bias", None) is not None:
        return "it has a bias"
    if weight.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[0], generator=generator).to(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        got, expected = norm(x), reference.rms_norm(x, weight, norm.eps)
    if got.shape != expected.shape or not torch.allclose(
        got.float(), expected.float(), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6
    ):
        return "its output is not RMSNorm's"
    return None


def is_linear(module: nn.Module) -> bool:
    """nn.Linear itself, or a class of its own (CoreNet has one) that does the same with its parts.
    A subclass of nn.Linear does something else on purpose (an adapter).
    """
    if type(module) is nn.Linear:
        return True
    parts = {name for name, _ in module.named_parameters()}
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or not parts <= {"weight", "bias"} or any(module.children()):
        return False
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.device.type == "meta":
        return False
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        expected = nn.functional.linear(x, weight, getattr(module, "bias", None))
        return torch.equal(module(x), expected)


def _missing_ffn(ffn: nn.Module) -> Reason | None:
    """Why a feed-forward network is none that the fused one computes."""
    if getattr(ffn, "act", None) is not None:
        with torch.no_grad():
            x = torch.linspace(-6, 6, 97)
            if not torch.allclose(ffn.act(x), nn.functional.silu(x), atol=1e-6):
                return "its activation is not SiLU"
    gated = is_gated(ffn)
    rows, columns = weight_of(ffn.proj_1).shape[0], weight_of(ffn.proj_2).shape[1]
    if rows != columns * (2 if gated else 1):
        return f"proj_1 gives {rows} columns, proj_2 takes {columns}"
    return None


def is_gated(ffn: nn.Module) -> bool:
    return bool(getattr(ffn, "with_glu", getattr(ffn, "ffn_with_glu", True)))


def heads_of(attn: nn.Module) -> tuple[int, int]:
    """(q_heads, kv_heads) of an attention module, 0 for what it doesn't say."""
    q = getattr(attn, "q_heads", getattr(attn, "num_q_heads", 0))
    kv = getattr(attn, "kv_heads", getattr(attn, "num_k_heads", 0))
    return q or 0, kv or 0


def _missing_heads(attn: nn.Module) -> Reason | None:
    """Why the heads of an attention module make no sense."""
    (q, kv), head_dim = heads_of(attn), getattr(attn, "head_dim", None)
    if not q or not kv or not head_dim:
        return "it doesn't say how many heads it has"
    rows = weight_of(attn.qkv_proj).shape[0]
    if rows != (q + 2 * kv) * head_dim:
        return f"qkv_proj gives {rows} columns for {q} + 2 x {kv} heads of {head_dim}"
    return None


def _convention(model: nn.Module, attn: nn.Module) -> Convention:
    parameters = inspect.signature(type(attn).forward).parameters
    for convention in CONVENTIONS:
        if convention.mark in parameters:
            return convention
    marks = ", ".join(c.mark for c in CONVENTIONS)
    _refuse(model, f"its attention's forward takes ({', '.join(parameters)}), none of {marks}")


def examine(
    model: nn.Module, body: Any, prefix: str
) -> tuple[Convention, list[tuple[str, Reason]]]:
    """Check the whole layout; nothing is changed. Returns what is to be left, with the reasons.
    Raises ValueError, with the reason, for a model that isn't known.
    """
    for name in ("norm", "token_embeddings"):
        if not isinstance(getattr(body, name, None), nn.Module):
            _refuse(model, f"it has no `{prefix}{name}`")
    convention = _convention(model, _child(body.layers[0], "attn") or body.layers[0])
    if reason := missing_dtype(body):
        _refuse(model, reason)
    left = []
    for i, layer in enumerate(body.layers):
        where = f"{prefix}layers.{i}"
        for path in (*PROJECTIONS, "attn_norm", "ffn_norm"):
            if not isinstance(_child(layer, path), nn.Module):
                _refuse(model, f"it has no `{where}.{path}`")
        if _convention(model, layer.attn) is not convention:
            _refuse(model, f"`{where}.attn` is called in another way than the layers before")
        if not hasattr(layer.attn, "q_norm") or not hasattr(layer.attn, "k_norm"):
            _refuse(model, f"`{where}.attn` has no q_norm and k_norm (None for no QK norm)")
        if reason := _missing_heads(layer.attn):
            _refuse(model, f"`{where}.attn`: {reason}")
        rotary = getattr(layer.attn, "pos_embedding", None)
        if convention.foreign and not (
            hasattr(rotary, "freq_constant") and hasattr(rotary, "max_seq_length")
        ):
            _refuse(model, f"`{where}.attn.pos_embedding` has no freq_constant and max_seq_length")
        norms = {"attn_norm": layer.attn_norm, "ffn_norm": layer.ffn_norm}
        if layer.attn.q_norm is not None:
            norms |= {"attn.q_norm": layer.attn.q_norm, "attn.k_norm": layer.attn.k_norm}
        for path, norm in norms.items():
            if reason := _missing_norm(norm):
                _refuse(model, f"`{where}.{path}`: {reason}")
        if reason := _missing_ffn(layer.ffn):
            left.append((f"{where}.ffn", reason))
        left += [
            (f"{where}.{path}".rstrip("."), "it has hooks, which a swap would drop")
            for path in ("", "attn", "ffn", "attn_norm", *PROJECTIONS)
            if has_hooks(_child(layer, path) if path else layer)
        ]
    if reason := _missing_norm(body.norm):
        _refuse(model, f"`{prefix}norm`: {reason}")
    return convention, left
