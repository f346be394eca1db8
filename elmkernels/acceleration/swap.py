"""accelerate: put fused modules into an OpenELM model in one call; restore: take them out again.

A model is known by the layout of its modules (see `layout`), not by its class. Everything is
examined before anything is touched, so a model is accelerated or refused, and what had to be left
is in the report. Parameters are shared.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backends import choose
from ..openelm.compressed import Compressed, weight_of
from ..openelm.layers import LogitsHead
from ..openelm.loss import LossHead
from ..openelm.surgery import Mark, mark_of, set_mark, set_module
from ..ops._rows_choice import described
from ..ops.linear import MAX_ROWS
from . import fused, projections, small_batch
from .backend_choice import OPS, given_backends
from .decode_modes import modes_of
from .layout import PROJECTIONS, Convention, body_of, examine, heads_of, is_gated, is_linear
from .projections import Plan, measure_plan


@dataclass
class Report:
    """What `accelerate` did: one line a fact, and the same as data."""

    convention: str
    backends: dict[str, str]
    accelerated: dict[str, int]
    left: list[tuple[str, str]]
    gemm: Plan
    prepacked_bytes: int = 0
    attention: str = ""  # its backend: the preferred one where the named one has it not
    loss: str = ""  # the same of linear_cross_entropy; empty where the model has no `loss`
    fallbacks: list[str] = field(default_factory=list)  # what can't run on this GPU, and instead
    decode_modes: dict[str, str | None] = field(
        default_factory=dict
    )  # of decoding on a GPU: see `modes_of`
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.accelerated.items())
        backends = ", ".join(f"{op}: {name}" for op, name in self.backends.items())
        gemm = (
            f"1 row {self.gemm.one_row}, up to {projections.FEW_ROWS} {self.gemm.few_rows}, "
            f"more {self.gemm.many_rows}, training {self.gemm.training}"
        )
        lines = [
            f"accelerated ({self.convention} model): {kinds}",
            f"backends: {backends}, attention: {self.attention}"
            + (f", linear_cross_entropy: {self.loss}" if self.loss else ""),
            f"projections: {gemm}",
        ]
        if self.prepacked_bytes:
            lines.append(
                f"prepacked weights: up to {self.prepacked_bytes / 2**20:.0f} MiB more memory"
            )
        lines += self.fallbacks
        if self.decode_modes:
            possible = [mode for mode, reason in self.decode_modes.items() if reason is None]
            lines.append(f"decoding: by {' or '.join(possible) or 'calls alone'}")
            lines += [
                f"not by {mode}: {reason}" for mode, reason in self.decode_modes.items() if reason
            ]
        lines += [f"left {path}: {reason}" for path, reason in self.left]
        return "\n".join(lines + self.notes)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """An accelerated model with its own modules in place, to be looked at, and back again."""
    mark = mark_of(model)
    originals = {} if mark is None else mark.originals
    fused = {path: model.get_submodule(path) for path in originals}
    try:
        for path, module in originals.items():  # parents first
            set_module(model, path, module)
        yield
    finally:
        for path, module in fused.items():
            set_module(model, path, module)


def _device_of(weight: Tensor) -> torch.device:
    """Where a model runs: one without weights yet (meta) as on a CPU."""
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = None,
    prepack: bool = False,
    plan: Plan | None = None,
) -> Report:
    """Swap fused modules into an OpenELM model, in place; its Parameters stay the same objects.

    model: an `elmkernels.OpenELM`, or any model with the module layout of CoreNet or of Apple's
    Hugging Face code. backend: None for the best of each device at every call (on a GPU, of what
    this very one can run: the report names the rest), or a name, which then never falls back.
    prepack: also let projections keep a prepacked copy of their weights where that measures
    faster (more memory; see `openelm.linear`). plan: the projections' routines, as an earlier
    Report's `gemm` says them, instead of measuring which are fastest here.
    Returns a Report. Raises ValueError, with the reason, for a model it doesn't know and for an
    unknown backend, RuntimeError for a backend that can't run here; the model is then unchanged.
    A model that is accelerated already is accelerated anew, or with an error stays as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan or None, got {type(plan).__name__}")
    arguments = {"backend": backend, "prepack": prepack, "plan": plan}
    body, prefix = body_of(model)
    weight = body.norm.weight  # an embedding may be compressed
    device = _device_of(weight)
    kind = device.type
    given, fallbacks = given_backends(device, backend)
    with _as_it_was(model):
        convention, left = examine(model, body, prefix)
    if mark_of(model) is not None:
        restore(model)
    backends = {op: described(op, kind, given[op]) for op in OPS}
    if plan is None:
        plan = measure_plan(weight.dtype, prepack) if kind == "cpu" else Plan()
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
        if not is_linear(original):
            if path not in skip:
                report.left.append((path, f"{type(original).__name__} is not nn.Linear"))
            return
        swap(path, "projections", lambda m: projections.Linear(m, plan))

    for i, layer in enumerate(body.layers):
        where = f"{prefix}layers.{i}"
        q_heads, kv_heads = heads_of(layer.attn)
        gated = is_gated(layer.ffn)
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
        swap("tied_head", "tied heads", lambda m: projections.TiedHead(plan, given["linear"]))
    else:
        report.left.append(("the output projection", "the model computes it in its own forward"))
    if isinstance(getattr(model, "logits_head", None), LogitsHead):
        swap("logits_head", "logits heads", lambda m: fused.FusedLogitsHead())
    if isinstance(getattr(model, "loss_head", None), LossHead):
        named = given["linear_cross_entropy"]
        swap("loss_head", "loss heads", lambda m: fused.FusedLossHead(named))
        report.loss = choose("linear_cross_entropy", kind, named)
    report.accelerated = dict(counts)
    report.notes += [f"kept {n} {kind}" for kind, n in Counter(kept).items()]
    if not convention.foreign and small_batch.streams(kind, given["linear"]):
        which = "any" if plan.streamed else "compressed"
        report.notes.append(
            f"up to {MAX_ROWS} rows without gradients: norms, SwiGLU and additions in the products "
            f"with {which} weights"
        )
    if plan.prepacks:
        report.prepacked_bytes = _projection_bytes(model)
    set_mark(model, Mark(originals, arguments))
    if kind == "cuda":
        report.decode_modes = modes_of(model, device)
    return report


def _attention(
    convention: Convention, given: dict[str, str | None], original: nn.Module, index: int,
    q_heads: int, kv_heads: int,
) -> fused.FusedAttention:  # fmt: skip
    made = convention.attention(original, index, q_heads, kv_heads, given["qk_norm_rope"])
    made.attention_backend = given["attention"]
    return made


def _projection_bytes(model: nn.Module) -> int:
    total = sum(m.weight.nbytes for m in model.modules() if isinstance(m, projections.Linear))
    if any(isinstance(m, projections.TiedHead) for m in model.modules()):
        head = weight_of(model.token_embeddings)
        total += head.nbytes if isinstance(head, Tensor) else 0
    return total


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the original modules return, with the Parameters the model has now.

    Raises ValueError for a model that isn't accelerated.
    """
    mark = mark_of(model)
    if mark is None:
        raise ValueError(f"model ({type(model).__name__}) must be accelerated to be restored")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    training = {name: module.training for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, Compressed):
            module.backend = None
    for path, module in mark.originals.items():  # parents first, as they were accelerated
        set_module(model, path, module)
    for name, module in model.named_modules():
        module.training = training.get(name, model.training)
        for key in module._parameters:
            path = f"{name}.{key}" if name else key
            if path in parameters:
                module._parameters[key] = parameters[path]
    set_mark(model, None)
