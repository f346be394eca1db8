"""accelerate: put fused modules into an OpenELM model in one call; restore: take them out again.

A model is known by the layout of its modules (see `layout`), not by its class. Everything is
examined before anything is touched, so a model is accelerated or refused, and what had to be left
is in the report. Parameters are shared.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Reason, missing_kernels
from ..devices import BackendChoice, backend_choices, never_fall_back
from ..openelm.compressed import Compressed, weight_of
from ..openelm.layers import LogitsHead
from ..openelm.loss import LossHead
from ..openelm.surgery import Mark, mark_of, set_mark, set_module, undo_of
from ..ops.linear import MAX_ROWS
from . import fused, projections, small_batch
from .decode_modes import modes_of
from .layout import (
    PROJECTIONS,
    Convention,
    body_of,
    examine,
    heads_of,
    inner,
    is_gated,
    is_linear,
)
from .projections import Plan, measure_plan
from .report import Report, fallbacks


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

    A model that is accelerated already is accelerated anew.

    Args:
        model: an `elmkernels.OpenELM`, or any model with the module layout of CoreNet or of
            Apple's Hugging Face code.
        backend: None for the best of each device at every call (on a GPU, of what this very one
            can run: the report names the rest), or a name, which then never falls back.
        prepack: also let projections keep a prepacked copy of their weights if that measures
            faster (more memory; see `acceleration.projections`).
        plan: the projections' routines, as an earlier Report's `gemm` says them, instead of
            measuring which are fastest here.

    Returns:
        A Report of what was put in, what was left and why.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model isn't one that is known (with the reason), or no backend has the name.
        RuntimeError: the backend can't run here.
            The model is unchanged after any of them; one that was accelerated still is.

    Example:
        >>> model = elmkernels.OpenELM.from_pretrained("OpenELM-270M")
        >>> print(elmkernels.accelerate(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {type(backend).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan or None, got {type(plan).__name__}")
    model = inner(model)
    body, prefix = body_of(model)
    convention, left = _examined(model, body, prefix)
    weight = body.norm.weight  # an embedding may be compressed
    device = _device_of(weight)
    choices = backend_choices(device, backend)
    arguments = {"backend": backend, "prepack": prepack, "plan": plan}
    if plan is None:
        plan = measure_plan(weight.dtype, prepack) if device.type == "cpu" else Plan()
    swap = _Swap(model, convention, left, choices, plan)
    undo, compressed = undo_of(model), _compressed_backends(model)
    try:
        if mark_of(model) is not None:
            restore(model)
        swap.all(body, prefix)
        set_mark(model, Mark(swap.originals, arguments, swap.named))
        return _report(swap, device, backend)
    except BaseException:
        undo()
        for module, name in compressed:
            module.backend = name
        raise


def _examined(
    model: nn.Module, body: Any, prefix: str
) -> tuple[Convention, list[tuple[str, Reason]]]:
    """`layout.examine` of a model as it was before it was accelerated, if it is."""
    undo, mark = undo_of(model), mark_of(model)
    try:
        for path, module in ({} if mark is None else mark.originals).items():  # parents first
            set_module(model, path, module)
        return examine(model, body, prefix)
    finally:
        undo()


def _compressed_backends(model: nn.Module) -> list[tuple[Compressed, str | None]]:
    return [(m, m.backend) for m in model.modules() if isinstance(m, Compressed)]


class _Swap:
    """Puts fused modules into a model that was examined, and counts them."""

    def __init__(
        self, model: nn.Module, convention: Convention, left: list[tuple[str, Reason]],
        choices: dict[str, BackendChoice], plan: Plan,
    ) -> None:  # fmt: skip
        self.model, self.convention, self.plan, self.choices = model, convention, plan, choices
        self.left, self.skip = left, {path for path, _ in left}
        self.named = {op: choice.named for op, choice in choices.items()}
        self.originals: dict[str, nn.Module] = {}
        self.counts: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def all(self, body: Any, prefix: str) -> None:
        for i, layer in enumerate(body.layers):
            self.layer(f"{prefix}layers.{i}", i, layer)
        self.norm(f"{prefix}norm")
        self.heads()

    def put(self, path: str, kind: str, make: Callable[[nn.Module], nn.Module]) -> None:
        if path in self.skip:
            return
        original = self.originals[path] = self.model.get_submodule(path)
        fresh = make(original)
        fresh.training = original.training
        set_module(self.model, path, fresh)
        self.counts[kind] += 1

    def layer(self, where: str, index: int, layer: Any) -> None:
        named, convention = self.named, self.convention
        heads, gated = heads_of(layer.attn), is_gated(layer.ffn)
        self.put(
            where,
            "layers",
            lambda m: convention.layer(m, named["add_rms_norm"], named["linear"]),
        )
        self.norm(f"{where}.attn_norm")
        if where in self.skip:  # a fused layer takes ffn_norm's weight for its add_rms_norm
            self.norm(f"{where}.ffn_norm")
        backends = named["qk_norm_rope"], named["attention"]
        self.put(
            f"{where}.attn",
            "attentions",
            lambda m: convention.attention(m, index, *heads, *backends),
        )
        self.put(
            f"{where}.ffn",
            "feed-forwards",
            lambda m: fused.FusedFeedForward(m, gated, named["swiglu"]),
        )
        for path in PROJECTIONS:
            self.projection(f"{where}.{path}")

    def norm(self, path: str) -> None:
        self.put(path, "norms", lambda m: fused.FusedRMSNorm(m, self.named["rms_norm"]))

    def projection(self, path: str) -> None:
        original = self.model.get_submodule(path)
        if isinstance(original, Compressed):
            original.backend = self.named["linear"]
            self.kept[type(original).__name__] += 1
        elif is_linear(original):
            self.put(path, "projections", lambda m: projections.Linear(m, self.plan))
        elif path not in self.skip:
            self.left.append((path, f"{type(original).__name__} is not nn.Linear"))

    def heads(self) -> None:
        """The output projection, and how logits and losses are made."""
        model, named = self.model, self.named
        if isinstance(getattr(model, "classifier", None), nn.Module):
            self.projection("classifier")
        elif isinstance(getattr(model, "tied_head", None), nn.Module):
            head = projections.TiedHead(self.plan, named["linear"])
            self.put("tied_head", "tied heads", lambda m: head)
        else:
            self.left.append(("the output projection", "the model computes it in its own forward"))
        if isinstance(getattr(model, "logits_head", None), LogitsHead):
            fresh = fused.FusedLogitsHead(named["linear"])
            self.put("logits_head", "logits heads", lambda m: fresh)
        if isinstance(getattr(model, "loss_head", None), LossHead):
            loss = fused.FusedLossHead(named["linear_cross_entropy"])
            self.put("loss_head", "loss heads", lambda m: loss)


def _report(swap: _Swap, device: torch.device, asked: str | None) -> Report:
    """Of a model in which all modules are in place."""
    choices, plan, foreign = swap.choices, swap.plan, swap.convention.foreign
    backends = {op: choices[op].resolved for op in never_fall_back()}
    report = Report(swap.convention.name, backends, dict(swap.counts), swap.left, plan)
    report.attention = choices["attention"].resolved
    if "loss_head" in swap.originals:
        report.loss = choices["linear_cross_entropy"].resolved
    if asked is None:
        report.missing = missing_kernels(device.type)
        report.fallbacks = fallbacks(device, choices) if device.type == "cuda" else []
    if foreign:
        report.notes.append(
            "its cache holds rotated keys from now on: start generation with a new one"
        )
    report.notes += [f"kept {n} {kind}" for kind, n in swap.kept.items()]
    if not foreign and small_batch.streams(device.type, swap.named["linear"]):
        which = "any" if plan.streamed else "compressed"
        report.notes.append(
            f"up to {MAX_ROWS} rows without gradients: norms, SwiGLU and additions in the products "
            f"with {which} weights"
        )
    if plan.prepacks:
        report.prepacked_bytes = _projection_bytes(swap.model)
    if device.type == "cuda":
        report.decode_modes = modes_of(swap.model, device)
    return report


def _projection_bytes(model: Any) -> int:
    total = sum(m.weight.nbytes for m in model.modules() if isinstance(m, projections.Linear))
    if any(isinstance(m, projections.TiedHead) for m in model.modules()):
        head = weight_of(model.token_embeddings)
        total += head.nbytes if isinstance(head, Tensor) else 0
    return total


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the original modules return, with the Parameters the model has now.

    Args:
        model: one that is accelerated.

    Raises:
        ValueError: the model isn't accelerated.

    Example:
        >>> elmkernels.restore(model)
    """
    model = inner(model)
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
