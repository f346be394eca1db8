"""What every op is measured against, and the least work that it can be done with.

- "reference": the specification, naive eager torch.
- "eager": torch's own fused operations, called as well as one can: for a compressed weight the
  product with the dense one, kept. SwiGLU and a whole decoder have none but their reference.
- "documents": for varlen documents, whose "eager" has a dense mask, one eager call for each.
- "compiled": `torch.compile` of the reference; not of a whole decoder, where the number of keys
  breaks the graph and the widths of the layers exceed torch's limit of recompilations.
- "torch": `F.linear_cross_entropy` in chunks of its default size, where this torch has it.
- "liger": Liger-Kernel, on a GPU, where it is installed and has the op.
- "cce": Apple's cut-cross-entropy, on a GPU, where it is installed.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.common import document_of
from ..testing.parity import specification
from ..weights.formats import Arena, DecoderWeights, Layer, Weight
from .timing import total_bytes

# decode_step has no backward; that of linear is torch's own products.
NO_BACKWARD = ("linear", "decode_step")


def _eager_rms_norm(args: tuple, kwargs: dict) -> Callable:
    def rms_norm(x, weight, eps=1e-6):
        return F.rms_norm(x, weight.shape, weight, eps)

    return rms_norm


def _eager_add_rms_norm(args: tuple, kwargs: dict) -> Callable:
    def add_rms_norm(x, residual, weight, eps=1e-6):
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    return add_rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads x [..., heads, head_dim]; cos and sin [..., 1, head_dim], the
    sine's first half negated."""
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, rolled, sin).to(x.dtype)


def _eager_qk_norm_rope(args: tuple, kwargs: dict) -> Callable:
    """cos and sin are gathered beforehand, as a model does once for all of its layers. A rotation
    is then three passes: by a rolled copy and a sine whose first half is negated."""
    positions, table = args[3], args[6]
    cos, sin = table[positions].unsqueeze(-2).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return rotate(x if weight is None else F.rms_norm(x, weight.shape, weight, eps), cos, sin)

    def qk_norm_rope(qkv, q_weight, k_weight, positions, q_heads, kv_heads, table, eps=1e-6):
        heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1))
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=-2)
        return normed(q, q_weight, eps), normed(k, k_weight, eps), v

    return qk_norm_rope


def _eager_attention(args: tuple, kwargs: dict) -> Callable:
    """One token's query heads become the rows of one small matrix, so that each key is read once:
    up to twelve times faster than enable_gqa in bfloat16."""

    def attention(q, k, v, scale=None):
        batch, length, heads, head_dim = q.shape
        one = length == 1
        queries = q.reshape(batch, k.shape[2], -1, head_dim) if one else q.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            queries,
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=not one,
            scale=scale,
            enable_gqa=not one,
        )
        return out.reshape(q.shape) if one else out.transpose(1, 2)

    return attention


def _eager_varlen(args: tuple, kwargs: dict) -> Callable:
    """The mask of whole documents is made beforehand, as a model does once for its layers."""
    length = args[0].shape[1]
    document = document_of(kwargs["cu_seqlens"], length)
    mask = (document[:, None] == document).tril()

    def attention(q, k, v, cu_seqlens, scale=None):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def _by_document(args: tuple, kwargs: dict) -> Callable:
    """One call of torch's for each document, whose lengths the host knows beforehand."""
    lengths = [n for n in kwargs["cu_seqlens"].diff().tolist() if n]

    def attention(q, k, v, cu_seqlens, scale=None):
        parts = zip(*(t.transpose(1, 2).split(lengths, dim=2) for t in (q, k, v)), strict=True)
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        found = [F.scaled_dot_product_attention(*part, **options) for part in parts]
        return torch.cat(found, dim=2).transpose(1, 2)

    return attention


def _eager_linear(args: tuple, kwargs: dict) -> Callable:
    x, weight = args
    dense = weight if isinstance(weight, Tensor) else reference.dense(weight, x.dtype)
    if not kwargs:
        return lambda x, weight: F.linear(x, dense)

    def linear(x, weight, norm=None, eps=1e-6, swiglu=False, residual=None):
        y = F.linear(x if norm is None else F.rms_norm(x, norm.shape, norm, eps), dense)
        if swiglu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if residual is None else residual + y

    return linear


def _eager_linear_cross_entropy(args: tuple, kwargs: dict) -> Callable:
    def linear_cross_entropy(hidden, weight, targets):
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    return linear_cross_entropy


EAGER: dict[str, Callable[[tuple, dict], Callable]] = {
    "rms_norm": _eager_rms_norm,
    "add_rms_norm": _eager_add_rms_norm,
    "qk_norm_rope": _eager_qk_norm_rope,
    "attention": _eager_attention,
    "linear": _eager_linear,
    "linear_cross_entropy": _eager_linear_cross_entropy,
}


def _liger(op: str) -> Callable | None:
    """Liger-Kernel's function under our op's signature, where it is installed and has it."""
    if op not in ("rms_norm", "add_rms_norm", "swiglu", "linear_cross_entropy"):
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    functional = importlib.import_module("liger_kernel.transformers.functional")
    if op == "linear_cross_entropy":
        return lambda hidden, weight, targets: functional.liger_fused_linear_cross_entropy(
            hidden.flatten(0, -2), weight, targets.flatten()
        )
    if op == "rms_norm":
        return lambda x, w, eps=1e-6: functional.liger_rms_norm(x, w, eps, in_place=False)
    if op == "swiglu":
        return lambda gate_up: functional.liger_swiglu(*gate_up.chunk(2, dim=-1))
    fused = getattr(functional, "liger_fused_add_rms_norm", None)
    return None if fused is None else lambda x, r, w, eps=1e-6: fused(x, r, w, eps)


def _torch_linear_cross_entropy() -> Callable | None:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return None
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden.flatten(0, -2), weight, targets.flatten(), options=options()
    )


def _cut_cross_entropy() -> Callable | None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def baselines(
    op: str, args: tuple, kwargs: dict, device: torch.device, compiled: bool
) -> dict[str, Callable]:
    """{name: function under the op's signature} to measure it against on these inputs."""
    # What a step of decoding wrote is gathered for parity's sake only.
    spec = reference.decode_step if op == "decode_step" else specification(op)
    found = {"reference": spec}
    if op == "attention" and "cu_seqlens" in kwargs:
        found |= {"eager": _eager_varlen(args, kwargs), "documents": _by_document(args, kwargs)}
    elif op in EAGER:
        found["eager"] = EAGER[op](args, kwargs)
    if compiled and op != "decode_step":
        found["compiled"] = torch.compile(spec, fullgraph=True, dynamic=False)
    if device.type == "cuda":
        found["liger"] = _liger(op)
    if op == "linear_cross_entropy":
        found["torch"] = _torch_linear_cross_entropy()
        found["cce"] = _cut_cross_entropy() if device.type == "cuda" else None
    return {name: fn for name, fn in found.items() if fn is not None}


def least_bytes(
    op: str, args: tuple, outputs: tuple[Tensor, ...], backward: bool, kwargs: dict | None = None
) -> int:
    """The bytes that an op must move: every input that it needs read once, every output written
    once; with the backward, also the cotangents and inputs read and the gradients written. Of the
    keyword arguments those of linear count.
    """
    if op == "linear":
        around = [t for t in (kwargs or {}).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*args, *around, *outputs))
    if op == "decode_step":
        return _decode_step_bytes(*args, *outputs)
    if op == "linear_cross_entropy":
        written = total_bytes(*args[:2]) if backward else 0
        return total_bytes(*args, *outputs) + written
    floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    if op != "qk_norm_rope":
        forward = total_bytes(*floats, *outputs)
        return 2 * forward + total_bytes(*floats) if backward else forward
    qkv, q_weight, k_weight, positions = args[:4]
    q, k, v = outputs
    # v is a view: not read, not written. Of the table each token needs its own row.
    rows = positions.numel() * args[6].shape[1] * args[6].element_size()
    read = total_bytes(q, k, q_weight, k_weight, positions) + rows
    forward = read + total_bytes(q, k)
    if not backward:
        return forward
    return forward + read + total_bytes(q, k, v) + total_bytes(qkv, q_weight, k_weight)


def _decode_step_bytes(
    stack: DecoderWeights, tokens: Tensor, positions: Tensor, arena: Arena, logits: Tensor
) -> int:
    """Every weight but the embedding's other rows, and the keys and values that are seen."""
    weights = [w for layer in stack.layers for w in _matrices(layer)] + [stack.head]
    norms = [x for layer in stack.layers for x in layer if isinstance(x, Tensor) and x.dim() == 1]
    embedded = stack.embedding.nbytes // stack.embedding.shape[0] * tokens.numel()
    token = 2 * sum(layer.kv_heads for layer in stack.layers) * stack.head_dim
    cached = token * arena.data.element_size() * int((positions + 1).sum())
    return sum(w.nbytes for w in weights) + total_bytes(*norms, logits) + embedded + cached


def _matrices(layer: Layer) -> tuple[Weight, ...]:
    return layer.qkv_proj, layer.out_proj, layer.proj_1, layer.proj_2


def operations(op: str, args: tuple, kwargs: dict, backward: bool) -> int | None:
    """Floating-point operations of the matrix products in an op; None if it has none."""
    if op == "linear":
        x, weight = args
        return 2 * x.numel() * weight.shape[0]
    if op == "decode_step":
        stack, tokens = args[:2]
        weights = [w for layer in stack.layers for w in _matrices(layer)] + [stack.head]
        return 2 * tokens.numel() * sum(w.shape[0] * w.shape[1] for w in weights)
    if op == "linear_cross_entropy":
        hidden, weight = args[:2]
        return (6 if backward else 2) * hidden.numel() * weight.shape[0]
    if op != "attention":
        return None
    q, k = args[:2]
    batch, lq, heads, head_dim = q.shape
    lk = k.shape[1]
    pairs = batch * (lq * (lk - lq) + lq * (lq + 1) // 2)  # causal
    if "cu_seqlens" in kwargs:
        pairs = sum(n * (n + 1) // 2 for n in kwargs["cu_seqlens"].diff().tolist())
    forward = 4 * heads * head_dim * pairs
    # The backward makes five products of the forward's two, scores among them.
    return forward + forward * 5 // 2 if backward else forward
