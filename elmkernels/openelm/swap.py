"""accelerate: put fused modules into an OpenELM model in one call; restore: take them out again.

A model is known by the layout of its modules, not by its class: `layers[i].attn` with qkv_proj,
out_proj, q_norm, k_norm; `.ffn` with proj_1, proj_2; attn_norm, ffn_norm; norm; token_embeddings
(at the top or under `transformer`). Everything is examined before anything is touched, so a model
is swapped or refused, and what had to be left is in the report. Parameters are shared.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import reference
from ..backends import choose
from ..ops._rows_choice import described
from ..ops.linear import MAX_ROWS
from . import few_rows, fused, linear
from .compressed import Compressed, weight_of
from .given import OPS, given_backends
from .linear import Plan, measure_plan
from .loss import LossHead

PROJECTIONS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
_STATE, _ASKED = "_elmkernels_swap", "_elmkernels_backend"


@dataclass
class Report:
    """What `accelerate` did: one line a fact, and the same as data."""

    convention: str
    backends: dict[str, str]
    swapped: dict[str, int]
    left: list[tuple[str, str]]
    gemm: Plan
    packed_bytes: int = 0
    attention: str = ""  # its backend: the preferred one where the named one has it not
    loss: str = ""  # the same of linear_cross_entropy; empty where the model has no `loss`
    fallbacks: list[str] = field(default_factory=list)  # what can't run on this GPU, and instead
    ways: dict[str, str | None] = field(default_factory=dict)  # of decoding on a GPU: see `ways`
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.swapped.items())
        backends = ", ".join(f"{op}: {name}" for op, name in self.backends.items())
        gemm = (
            f"1 row {self.gemm.one_row}, up to {linear.FEW_ROWS} {self.gemm.few_rows}, "
            f"more {self.gemm.many_rows}, training {self.gemm.training}"
        )
        lines = [
            f"swapped ({self.convention} model): {kinds}",
            f"backends: {backends}, attention: {self.attention}"
            + (f", linear_cross_entropy: {self.loss}" if self.loss else ""),
            f"projections: {gemm}",
        ]
        if self.packed_bytes:
            lines.append(f"packed weights: up to {self.packed_bytes / 2**20:.0f} MiB more memory")
        lines += self.fallbacks
        if self.ways:
            possible = [way for way, reason in self.ways.items() if reason is None]
            lines.append(f"decoding: by {' or '.join(possible) or 'calls alone'}")
            lines += [f"not by {way}: {reason}" for way, reason in self.ways.items() if reason]
        lines += [f"left {path}: {reason}" for path, reason in self.left]
        return "\n".join(lines + self.notes)


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


def _refuse(model: nn.Module, reason: str) -> None:
    raise ValueError(f"model ({type(model).__name__}) is not an OpenELM this can swap: {reason}")


def _body(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the layers, and its prefix in the model's names."""
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


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of the model."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    owner._modules[name] = module


def _has_hooks(module: nn.Module) -> bool:
    return any(
        getattr(module, name, None)
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )


def _not_a_norm(norm: nn.Module | None) -> str | None:
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


def _is_linear(module: nn.Module) -> bool:
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


def _not_a_ffn(ffn: nn.Module) -> str | None:
    if getattr(ffn, "act", None) is not None:
        with torch.no_grad():
            x = torch.linspace(-6, 6, 97)
            if not torch.allclose(ffn.act(x), nn.functional.silu(x), atol=1e-6):
                return "its activation is not SiLU"
    gated = _is_gated(ffn)
    rows, columns = weight_of(ffn.proj_1).shape[0], weight_of(ffn.proj_2).shape[1]
    if rows != columns * (2 if gated else 1):
        return f"proj_1 gives {rows} columns, proj_2 takes {columns}"
    return None


def _is_gated(ffn: nn.Module) -> bool:
    return bool(getattr(ffn, "with_glu", getattr(ffn, "ffn_with_glu", True)))


def _heads(attn: nn.Module) -> tuple[int, int] | str:
    """(q_heads, kv_heads) of an attention module, or why they make no sense."""
    q = getattr(attn, "q_heads", getattr(attn, "num_q_heads", None))
    kv = getattr(attn, "kv_heads", getattr(attn, "num_k_heads", None))
    head_dim = getattr(attn, "head_dim", None)
    if not q or not kv or not head_dim:
        return "it doesn't say how many heads it has"
    rows = weight_of(attn.qkv_proj).shape[0]
    if rows != (q + 2 * kv) * head_dim:
        return f"qkv_proj gives {rows} columns for {q} + 2 x {kv} heads of {head_dim}"
    return q, kv


def _convention(model: nn.Module, attn: nn.Module) -> Convention:
    parameters = inspect.signature(type(attn).forward).parameters
    for convention in CONVENTIONS:
        if convention.mark in parameters:
            return convention
    marks = ", ".join(c.mark for c in CONVENTIONS)
    _refuse(model, f"its attention's forward takes ({', '.join(parameters)}), none of {marks}")


def _examine(model: nn.Module, body: nn.Module, prefix: str) -> tuple[Convention, list]:
    """Check the whole layout; nothing is changed. Returns what is to be left, with the reasons."""
    for name in ("norm", "token_embeddings"):
        if not isinstance(getattr(body, name, None), nn.Module):
            _refuse(model, f"it has no `{prefix}{name}`")
    convention = _convention(model, _child(body.layers[0], "attn") or body.layers[0])
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
        if isinstance(heads := _heads(layer.attn), str):
            _refuse(model, f"`{where}.attn`: {heads}")
        rotary = getattr(layer.attn, "pos_embedding", None)
        if convention.foreign and not (
            hasattr(rotary, "freq_constant") and hasattr(rotary, "max_seq_length")
        ):
            _refuse(model, f"`{where}.attn.pos_embedding` has no freq_constant and max_seq_length")
        norms = {"attn_norm": layer.attn_norm, "ffn_norm": layer.ffn_norm}
        if layer.attn.q_norm is not None:
            norms |= {"attn.q_norm": layer.attn.q_norm, "attn.k_norm": layer.attn.k_norm}
        for path, norm in norms.items():
            if reason := _not_a_norm(norm):
                _refuse(model, f"`{where}.{path}`: {reason}")
        if reason := _not_a_ffn(layer.ffn):
            left.append((f"{where}.ffn", reason))
        left += [
            (f"{where}.{path}".rstrip("."), "it has hooks, which a swap would drop")
            for path in ("", "attn", "ffn", "attn_norm", *PROJECTIONS)
            if _has_hooks(_child(layer, path) if path else layer)
        ]
    if reason := _not_a_norm(body.norm):
        _refuse(model, f"`{prefix}norm`: {reason}")
    return convention, left


def _device_of(weight: Tensor) -> torch.device:
    """Where a model runs: one without weights yet (meta) as on a CPU."""
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = None,
    pack_weights: bool = False,
    plan: Plan | None = None,
) -> Report:
    """Swap fused modules into an OpenELM model, in place; its Parameters stay the same objects.

    model: an `elmkernels.OpenELM`, or any model with the module layout of CoreNet or of Apple's
    Hugging Face code. backend: None for the best of each device at every call (on a GPU, of what
    this very one can run: the report names the rest), or a name, which then never falls back.
    pack_weights: also let projections keep a packed copy of their weights where that measures
    faster (more memory; see `openelm.linear`). plan: the projections' routines, as an earlier
    Report's `gemm` says them, instead of measuring which are fastest here.
    Returns a Report. Raises ValueError, with the reason, for a model it doesn't know and for an
    unknown backend, RuntimeError for a backend that can't run here; the model is then unchanged.
    A model that is accelerated already is restored first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_accelerated(model):
        restore(model)
    body, prefix = _body(model)
    convention, left = _examine(model, body, prefix)
    weight = body.norm.weight  # an embedding may be compressed
    device = _device_of(weight)
    kind = device.type
    given, fallbacks = given_backends(device, backend)
    backends = {op: described(op, kind, given[op]) for op in OPS}
    if plan is None:
        plan = measure_plan(weight.dtype, pack_weights) if kind == "cpu" else Plan()
    report = Report(convention.name, backends, {}, left, plan)
    report.attention = choose("attention", kind, given["attention"])
    report.fallbacks = fallbacks
    if convention.foreign:
        report.notes.append(
            "its cache holds rotated keys from now on: start generation with a new one"
        )
    originals: dict[str, nn.Module] = {}
    counts: Counter[str] = Counter()
    kept: list[str] = []
    skip = {path for path, _ in left}

    def swap(path: str, kind: str, make) -> None:
        if path not in skip:
            original = originals[path] = model.get_submodule(path)
            fresh = make(original)
            fresh.training = original.training
            set_module(model, path, fresh)
            counts[kind] += 1

    def swap_linear(path: str) -> None:
        original = model.get_submodule(path)
        if isinstance(original, Compressed):
            original.backend = given["linear"]
            kept.append(type(original).__name__)
            return
        if not _is_linear(original):
            if path not in skip:
                report.left.append((path, f"{type(original).__name__} is not nn.Linear"))
            return
        swap(path, "projections", lambda m: linear.Linear(m, plan))

    for i, layer in enumerate(body.layers):
        where = f"{prefix}layers.{i}"
        q_heads, kv_heads = _heads(layer.attn)
        gated = _is_gated(layer.ffn)
        swap(where, "layers", lambda m: convention.layer(m, given["add_rms_norm"]))
        norms = ["attn_norm"] if where not in skip else ["attn_norm", "ffn_norm"]
        for name in norms:  # a fused layer takes ffn_norm's weight for its add_rms_norm
            swap(f"{where}.{name}", "norms", lambda m: fused.FusedRMSNorm(m, given["rms_norm"]))
        swap(
            f"{where}.attn",
            "attentions",
            lambda m, i=i, q=q_heads, kv=kv_heads: _attention(convention, given, m, i, q, kv),
        )
        swap(
            f"{where}.ffn",
            "feed-forwards",
            lambda m, gated=gated: fused.FusedFeedForward(m, gated, given["swiglu"]),
        )
        for path in PROJECTIONS:
            swap_linear(f"{where}.{path}")
    swap(f"{prefix}norm", "norms", lambda m: fused.FusedRMSNorm(m, given["rms_norm"]))
    if isinstance(getattr(model, "classifier", None), nn.Module):
        swap_linear("classifier")
    elif isinstance(getattr(model, "tied_head", None), nn.Module):
        swap("tied_head", "tied heads", lambda m: linear.TiedHead(plan, given["linear"]))
    else:
        report.left.append(("the output projection", "the model computes it in its own forward"))
    if isinstance(getattr(model, "loss_head", None), LossHead):
        named = given["linear_cross_entropy"]
        swap("loss_head", "loss heads", lambda m: fused.FusedLossHead(named))
        report.loss = choose("linear_cross_entropy", kind, named)
    report.swapped = dict(counts)
    report.notes += [f"kept {n} {kind}" for kind, n in Counter(kept).items()]
    if not convention.foreign and few_rows.streams(kind, given["linear"]):
        which = "any" if plan.streamed else "compressed"
        report.notes.append(
            f"up to {MAX_ROWS} rows without gradients: norms, SwiGLU and additions in the products "
            f"with {which} weights"
        )
    if plan.packs:
        report.packed_bytes = _projection_bytes(model)
    setattr(model, _STATE, originals)
    setattr(model, _ASKED, backend)
    if kind == "cuda":
        from .ways import ways  # late: it describes models, which asks whether they are swapped

        report.ways = ways(model, device)
    return report


def _attention(
    convention: Convention, given: dict[str, str | None], original: nn.Module, index: int,
    q_heads: int, kv_heads: int,
) -> fused.FusedAttention:  # fmt: skip
    made = convention.attention(original, index, q_heads, kv_heads, given["qk_norm_rope"])
    made.attention_backend = given["attention"]
    return made


def _projection_bytes(model: nn.Module) -> int:
    total = sum(m.weight.nbytes for m in model.modules() if isinstance(m, linear.Linear))
    if any(isinstance(m, linear.TiedHead) for m in model.modules()):
        head = weight_of(model.token_embeddings)
        total += head.nbytes if isinstance(head, Tensor) else 0
    return total


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has swapped modules of this very model."""
    return hasattr(model, _STATE)


def asked_backend(model: nn.Module) -> str | None:
    """The backend that `accelerate` was asked for; modules may have been given another."""
    return getattr(model, _ASKED, None)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the original modules return, with the Parameters the model has now.

    Raises ValueError for a model that isn't accelerated.
    """
    originals: dict[str, nn.Module] | None = getattr(model, _STATE, None)
    if originals is None:
        raise ValueError(f"model ({type(model).__name__}) must be accelerated to be restored")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    training = {name: module.training for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, Compressed):
            module.backend = None
    for path, module in originals.items():  # parents first, as they were swapped
        set_module(model, path, module)
    for name, module in model.named_modules():
        module.training = training.get(name, model.training)
        for key in module._parameters:
            path = f"{name}.{key}" if name else key
            if path in parameters:
                module._parameters[key] = parameters[path]
    delattr(model, _STATE)
    vars(model).pop(_ASKED, None)
