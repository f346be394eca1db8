"""accelerate: give the modules of an OpenELM model fused classes in one call; restore: their own.

A model is known by the layout of its modules (see `layout`), not by its class. Everything is
examined before anything is touched, so a model is accelerated or refused, and what had to be left
is in the report. Every module stays the same object.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Reason, missing_kernels
from ..checks import fail
from ..devices import BackendChoice, backend_choices, free_memory, never_fall_back
from ..openelm.compressed import Compressed
from ..ops.linear import MAX_ROWS
from ..surgery import Mark, has_mark, mark_of, set_mark
from . import fused, projections, small_batch
from .classes import Fused, fuse, own_class, undo_of, unfuse
from .decode_modes import modes_of
from .decoder_weights import forget_snapshot
from .foreign import ForeignState
from .layout import BLOCKS, NORMS, OUTPUTS, PROJECTIONS, Block, Layout, examine, wrapped_in
from .masks import Masks
from .models import BodyState, ModelState
from .projections import PATIENCE
from .report import Report, alone_note, fallbacks
from .routines import ALONE, Plan, alone_plan, check_alone, measure_plan
from .trying import given_by, missing_likeness, sample


def _device_of(weight: Tensor) -> torch.device:
    """Where a model runs: one without weights yet (meta) as on a CPU."""
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = None,
    prepack: bool | str | None = None,
    plan: Plan | None = None,
    activations: str | None = None,
) -> Report:
    """Give the modules of an OpenELM model fused classes, in place. Each stays the same object,
    with its hooks, Parameters and children, and of a subclass of its own class.

    A model that is accelerated already is accelerated anew. What hangs on a module (hooks, an own
    forward, an adapter), now or later, is called as it was.

    Args:
        model: an `elmkernels.OpenELM`, or any model with the module layout of CoreNet or of
            Apple's Hugging Face code, or what wraps one (torch.compile, PEFT, DDP, FSDP).
        backend: None for the best of each device at every call (on a GPU, of what this very one
            can run: the report names the rest), or a name, which then never falls back.
        prepack: whether projections may keep a prepacked copy of their weights, which takes as
            much memory again, where that measures faster. None: where it is so much faster that
            copies pay, and if ROOM (4) times what all of them take is free; a call of 128
            rows or more then makes and takes them (see `acceleration.projections`). "only": the
            copies stand instead of the weights, for all products without gradients. Who asks for
            a weight (`.weight`, `state_dict`, `train()`, a move) gets it dense, bit by bit, until
            the next product, or as long as someone has it. Decoding goes by the layers, slower.
        plan: the projections' routines, as an earlier Report's `gemm` says them, instead of
            measuring which are fastest here.
        activations: "int8" rounds what weights of 8 or 4 bits are multiplied by to 8 bits, on a
            CPU: less exact, without gradients (`elmkernels.linear`). None: as it is.

    Returns:
        A Report of what got a fused class, what was left and why.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model isn't one that is known (with the reason), or no backend has the name.
        RuntimeError: the backend can't run here.
            The model is unchanged after any of them; one that was accelerated still is.

    Example:
        >>> model = elmkernels.OpenELM.from_pretrained("OpenELM-270M")
        >>> print(elmkernels.accelerate(model))
    """
    _check_types(model, backend, prepack, plan)
    layout = examine(model)
    device = _device_of(layout.norm().weight)  # an embedding may be compressed
    dtype = layout.norm().weight.dtype
    choices = backend_choices(device, backend)
    if activations is not None:
        _check_rounding(layout, device, activations)
    arguments = {"backend": backend, "prepack": prepack, "plan": plan, "activations": activations}
    if isinstance(prepack, str):
        check_alone(prepack, device, dtype, plan)
        plan = plan and Plan(training=plan.training)
        if all(isinstance(b.parts[p], Compressed) for b in layout.blocks for p in PROJECTIONS):
            fail("prepack", "None or False: no projection has a dense weight", repr(prepack))
    patience, short, alone = 0, None, prepack == ALONE
    if plan is None:
        plan = Plan()
        if device.type == "cpu":
            copies = None if prepack is None else prepack is True
            plan, short = _measured_plan(layout, dtype, copies)
            patience = PATIENCE if prepack is None else 0
    swap = _Swap(layout, choices, plan, patience, activations, alone)
    undo = _undo_of(layout)
    try:
        _clear(layout.root)
        swap.all()
        set_mark(layout.root, Mark(arguments, swap.named))
        forget_snapshot(layout.root)
        held = projections.hold_all(layout.root)
        report = _report(swap, device, backend, held)
        report.notes += [] if short is None else [short]
        return report
    except BaseException:
        undo()
        raise


def _check_types(model: object, backend: object, prepack: object, plan: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {type(backend).__name__}")
    if not isinstance(prepack, bool | str | None):
        raise TypeError(f"prepack must be True, False, 'only' or None, got {prepack!r}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan or None, got {type(plan).__name__}")


def _check_rounding(layout: Layout, device: torch.device, activations: object) -> None:
    """Raise unless some weight meets rounded activations here."""
    if activations != "int8":
        fail("activations", "'int8' or None", repr(activations))
    if device.type != "cpu":
        fail("activations", f"None on {device.type}, 'int8' is for a CPU", repr(activations))
    held = (m.compressed() for m in layout.root.modules() if isinstance(m, Compressed))
    if not any(weight.takes_int8 for weight in held):
        needs = "None unless weights are quantized to 8 or 4 bits, as elmkernels.quantize does it"
        fail("activations", needs, repr(activations))


# A prepacked copy that nobody asked for is made only if this many times what all of them take is
# free: the dense weights stay, as streams of few rows and gradients read them.
ROOM = 4


def _measured_plan(
    layout: Layout, dtype: torch.dtype, prepack: bool | None
) -> tuple[Plan, Reason | None]:
    """The fastest routines, and why there are no prepacked copies that would pay."""
    plan = measure_plan(dtype, prepack)
    if prepack is not None or not plan.prepacks:
        return plan, None
    needed, free = _copies_bytes(layout), free_memory()
    if free is not None and free >= ROOM * needed:
        return plan, None
    found = "an unknown amount" if free is None else f"{free / 2**20:.0f} MiB"
    return measure_plan(dtype, False), (
        f"no prepacked copies, which would take {needed / 2**20:.0f} MiB: {found} of memory is "
        f"free, not {ROOM} times as much (prepack=True makes them all the same)"
    )


def _copies_bytes(layout: Layout) -> int:
    """What prepacked copies of all plain projections take, a tied head's embedding among them."""
    heads = layout.heads()
    modules = [block.parts[path] for block in layout.blocks for path in PROJECTIONS]
    modules += [heads[name] for name in OUTPUTS if name in heads]
    if not any(name in heads for name in OUTPUTS):
        modules.append(layout.body.token_embeddings)
    weights = {id(w): w for m in modules if (w := m._parameters.get("weight")) is not None}
    return sum(w.nbytes for w in weights.values())


def _undo_of(layout: Layout) -> Callable[[], None]:
    """What puts all that `accelerate` changes back as it is now."""
    root, classes = layout.root, undo_of(layout.root)
    compressed = [m for m in root.modules() if isinstance(m, Compressed)]
    held = [(m, m.backend, m.activations) for m in compressed]
    marks = [(m, mark_of(m) if has_mark(m) else None) for m in root.modules()]

    def undo() -> None:
        classes()
        for module, name, activations in held:
            module.backend, module.activations = name, activations
        for module, mark in marks:
            set_mark(module, mark)

    return undo


def _clear(root: nn.Module) -> None:
    """Give every module its own class back."""
    for module in root.modules():
        unfuse(module)
        set_mark(module, None)
        if isinstance(module, Compressed):
            module.backend = module.activations = None


KINDS = {"": "layers", "attn": "attentions", "ffn": "feed-forwards"}


class _Swap:
    """Gives the modules of a model that was examined their fused classes, and counts them."""

    def __init__(
        self,
        layout: Layout,
        choices: dict[str, BackendChoice],
        plan: Plan,
        patience: int,
        activations: str | None,
        alone: bool,
    ) -> None:
        self.layout, self.plan, self.choices, self.patience = layout, plan, choices, patience
        self.activations, self.alone = activations, alone
        self.named = {op: choice.named for op, choice in choices.items()}
        self.counts: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.done: set[int] = set()
        self.tried: dict[type, Reason | None] = {}
        self.masks = Masks()

    def all(self) -> None:
        for block in self.layout.blocks:
            own = self.outputs(block)
            self.block(block)
            self.compare(block, own)
        state = fused.State(self.named["rms_norm"])
        self.put(self.layout.norm(), fused.FusedRMSNorm, state, "norms")
        for name, head in self.layout.heads().items():
            self.head(name, head)
        self.whole()
        if not {*OUTPUTS, "tied_head"} & self.layout.heads().keys() and not self.counts["models"]:
            where, why = "the output projection", "the model computes it in its own forward"
            self.layout.left[where] = why

    def whole(self) -> None:
        """What stands round the layers of others' code."""
        layout, convention = self.layout, self.layout.convention
        if convention.body is not None:
            self.put(layout.body, convention.body, BodyState(self.masks), "bodies")
        if convention.model is not None and layout.whole is not None:
            loss = self.named["linear_cross_entropy"]
            state = ModelState(loss, self.products(), layout.output)
            self.put(layout.whole, convention.model, state, "models")

    def put(self, module: nn.Module, kind: type[Fused], state: object, what: str = "") -> None:
        """Give a module a fused class, unless it is to be left; count it as one of `what`."""
        if not self.layout.takes(module) or id(module) in self.done:
            return
        self.done.add(id(module))
        fuse(module, kind, state)
        if what:
            self.counts[what] += 1

    def block(self, block: Block) -> None:
        named, convention, parts = self.named, self.layout.convention, block.parts
        state = fused.LayerState(named["add_rms_norm"], named["linear"])
        self.put(parts[""], convention.layer, state, KINDS[""])
        for path in NORMS:
            # All but the first are parts of other ops, unless something hangs on them.
            what = "norms" if path == "attn_norm" else ""
            if parts[path] is not None:
                self.put(parts[path], fused.FusedRMSNorm, fused.State(named["rms_norm"]), what)
        self.put(parts["attn"], convention.attention, self.attention(block), KINDS["attn"])
        activation = parts["ffn"]._modules.get("act")
        kind = None if activation is None else type(activation)
        state = fused.FeedForwardState(named["swiglu"], block.gated, kind)
        self.put(parts["ffn"], fused.FusedFeedForward, state, KINDS["ffn"])
        for path in PROJECTIONS:
            self.projection(parts[path])

    def outputs(self, block: Block) -> dict[str, Tensor | None]:
        """What the parts of a layer give now, whose classes are others' code and not tried yet."""
        new = {n: m for n in BLOCKS if own_class(type(m := block.parts[n])) not in self.tried}
        x = sample(block.parts["attn_norm"]) if self.layout.convention.foreign and new else None
        return {} if x is None else {name: given_by(module, x) for name, module in new.items()}

    def compare(self, block: Block, own: dict[str, Tensor | None]) -> None:
        """Leave what gives another output by its fused class, and all of its class."""
        x = sample(block.parts["attn_norm"]) if own else None
        for name in ("attn", "ffn", ""):
            module = block.parts[name]
            kind = own_class(type(module))
            if name in own and x is not None:
                self.tried[kind] = missing_likeness(own[name], given_by(module, x))
            reason = self.tried.get(kind)
            if reason is not None and self.layout.takes(module):
                unfuse(module)
                self.layout.leave(module, reason)
                self.counts[KINDS[name]] -= 1

    def attention(self, block: Block) -> fused.AttentionState:
        """What the attention of a layer is given."""
        given = self.named["qk_norm_rope"], self.named["attention"], block.index, *block.heads
        convention = self.layout.convention
        if not convention.foreign:
            return fused.AttentionState(*given)
        rotary = block.parts["attn"].pos_embedding
        parts = rotary.freq_constant, rotary.max_seq_length, type(rotary)
        return ForeignState(*given, *parts, masks=self.masks if convention.masked else None)

    def products(self) -> projections.Products:
        """The routines of a projection."""
        return projections.Products(self.plan, self.named["linear"], self.patience)

    def projected(self, module: nn.Module) -> projections.Products:
        """Of a module, whose weight may be held prepacked alone unless it is looked up too."""
        own: Any = self.layout.body.token_embeddings
        if not self.alone or module._parameters.get("weight") is own._parameters.get("weight"):
            return self.products()
        return projections.Products(alone_plan(self.plan), self.named["linear"], alone=True)

    def projection(self, module: nn.Module) -> None:
        if isinstance(module, Compressed):
            module.backend = self.named["linear"]
            module.activations = self.activations if module.compressed().takes_int8 else None
            self.kept[type(module).__name__] += 1
        else:
            self.put(module, projections.Linear, self.projected(module), "projections")

    def head(self, name: str, module: nn.Module) -> None:
        """The output projection, and how logits and losses are made."""
        named = self.named
        if name in OUTPUTS:
            self.projection(module)
        elif name == "tied_head":
            state = projections.HeadState(self.products(), named["linear"], self.activations)
            self.put(module, projections.TiedHead, state, "tied heads")
        elif name == "logits_head":
            self.put(module, fused.FusedLogitsHead, fused.State(named["linear"]), "logits heads")
        else:
            state = fused.State(named["linear_cross_entropy"])
            self.put(module, fused.FusedLossHead, state, "loss heads")


def _report(swap: _Swap, device: torch.device, asked: str | None, held: list[int]) -> Report:
    """Of a model in which all modules have their classes. held: of `projections.hold_all`."""
    choices, plan, layout = swap.choices, swap.plan, swap.layout
    foreign = layout.convention.foreign
    backends = {op: choices[op].resolved for op in never_fall_back()}
    left = [(path or "the model", reason) for path, reason in layout.left.items()]
    left += layout.called()
    report = Report(layout.convention.name, backends, dict(swap.counts), left, plan)
    report.wrapped = wrapped_in(layout)
    report.attention = choices["attention"].resolved
    if layout.convention.masked:
        alone = "where nothing is padded" if swap.counts["bodies"] else "without one"
        report.attention = f"sdpa with the model's mask ({report.attention} {alone})"
    if swap.counts["loss heads"] or swap.counts["models"]:
        report.loss = choices["linear_cross_entropy"].resolved
    if asked is None:
        report.missing = missing_kernels(device.type)
        report.fallbacks = fallbacks(device, choices) if device.type == "cuda" else []
    if foreign:
        report.notes.append(
            "its cache holds rotated keys from now on: start generation with a new one"
        )
    report.notes += [f"kept {n} {kind}" for kind, n in swap.kept.items()]
    if swap.activations is not None:
        report.notes.append(
            "what quantized weights are multiplied by is rounded to 8 bits: less exact, and no "
            "gradient goes through it"
        )
    if not foreign and small_batch.streams(device.type, swap.named["linear"]):
        which = "any" if plan.streamed else "compressed"
        report.notes.append(
            f"up to {MAX_ROWS} rows without gradients: norms, SwiGLU and additions in the products "
            f"with {which} weights"
        )
    if swap.alone:
        report.gemm = alone_plan(plan)
        report.notes.append(alone_note(held))
    elif plan.prepacks:
        report.prepacked_bytes = _copies_bytes(layout)
    if device.type == "cuda":
        report.decode_modes = modes_of(layout.root, device)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module gets its own class back, and is what it is now else.

    Args:
        model: one that is accelerated, or what wraps it.

    Raises:
        ValueError: the model isn't accelerated.

    Example:
        >>> elmkernels.restore(model)
    """
    root = next((m for m in model.modules() if has_mark(m)), None)
    if root is None:
        raise ValueError(f"model ({type(model).__name__}) must be accelerated to be restored")
    _clear(root)
