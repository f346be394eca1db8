"""Changing the form of a model's weights in place: what quantize, pack and unpack share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration.layout import PROJECTIONS, native
from ..acceleration.routines import ALONE
from ..acceleration.swap import accelerate, restore
from ..backends import Reason
from ..openelm.compressed import Compressed, CompressedEmbedding, weight_of
from ..openelm.model import OpenELM
from ..openelm.progress import progress
from ..ops.linear import dense_rows
from ..surgery import mark_of, missing_own, set_module

# Hooks that see a weight's tensors by their names, which another form doesn't have.
_OF_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass
class Conversion:
    """What quantize, pack or unpack did; as text it is a line or more.

    Attributes:
        what: the deed: "quantized to 4 bits".
        matrices: how many were converted.
        left: (name of a module, why it stayed as it was).
        bytes_before, bytes_after: of the converted matrices.

    Example:
        >>> print(Conversion("packed", 2, bytes_before=2 << 20, bytes_after=1 << 20))
        packed 2 matrices: 2.0 MiB to 1.0 MiB
    """

    what: str
    matrices: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        before, after = (b / 2**20 for b in (self.bytes_before, self.bytes_after))
        lines = [f"{self.what} {self.matrices} matrices: {before:.1f} MiB to {after:.1f} MiB"]
        return "\n".join(lines + [f"left {path}: {reason}" for path, reason in self.left])


def matrices(model: OpenELM, embeddings: bool) -> list[str]:
    """Names of the modules that hold a projection; with embeddings, those of tokens as well."""
    names = [f"layers.{i}.{p}" for i in range(len(model.layers)) for p in PROJECTIONS]
    if embeddings:
        names.insert(0, "token_embeddings")
        names += ["classifier"] * (model.classifier is not None)
    return names


def missing_weight(module: nn.Module) -> Reason | None:
    """Why the weight of a module can't be taken over by another one, or None."""
    if reason := missing_own(module):
        return reason
    if "_compiled_call_impl" in vars(module):
        return "it is compiled by itself"
    if any(vars(module).get(name) for name in _OF_STATE):
        return "it has hooks on its state_dict"
    if isinstance(module, Compressed):
        return None
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"it must be nn.Linear or nn.Embedding, got {type(module).__name__}"
    if getattr(module, "bias", None) is not None:
        return "it has a bias"
    held = {*module._parameters, *module._buffers, *module._modules} - {"bias"}
    if held != {"weight"}:
        return f"it must hold a weight alone, got {', '.join(sorted(held))}"
    return None


def take_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give a module another one's hooks. The dicts themselves, as the handles that remove hooks
    hold those.
    """
    for name, value in vars(other).items():
        if name.startswith(("_forward_", "_backward_")) or name == "_is_full_backward_hook":
            vars(module)[name] = value


def dense_weight(module: nn.Module) -> Tensor:
    """The matrix of a projection or an embedding, without gradients."""
    weight = weight_of(module)
    return dense_rows(weight, weight.dtype, 0, weight.shape[0]).detach()


@torch.inference_mode(False)  # what it makes can be trained, and lives on, outside of that mode
@torch.no_grad()
def convert(
    model: OpenELM,
    embeddings: bool,
    what: str,
    check: Callable[[str, nn.Module], None],
    make: Callable[[str, nn.Module], nn.Module | str | None],
    show: bool,
) -> Conversion:
    """Put `make(name, module)` in place of every matrix of the model; None leaves it, a string
    leaves it with that reason. `check` looks at all of them before any is touched, and raises.

    An accelerated model is restored first and accelerated again at the end. Hooks go over to the
    new module; what else hangs on one (a forward of its own, weights that are computed) is refused.
    """
    found = native(model)
    if not isinstance(found, OpenELM):
        raise TypeError(f"model must be an elmkernels.OpenELM, got {type(found).__name__}")
    model = found
    mark = mark_of(model)
    if mark is not None:
        restore(model)
    done = Conversion(what)
    try:
        names = matrices(model, embeddings)
        for name in names:
            module = model.get_submodule(name)
            if missing := missing_weight(module):
                raise ValueError(f"{name}: {missing}")
            if weight_of(module).device.type == "meta":
                raise ValueError(f"{name} has no weights: it is on the meta device")
            check(name, module)
        for name in progress(names, what) if show else names:
            module = model.get_submodule(name)
            made = make(name, module)
            if isinstance(made, nn.Module):
                done.matrices += 1
                done.bytes_before += weight_of(module).nbytes
                done.bytes_after += weight_of(made).nbytes
                made.training = module.training
                take_hooks(made, module)
                set_module(model, name, made)
            elif made is not None:
                done.left.append((name, made))
    finally:
        if mark is not None:
            accelerate(model, **_still_possible(model, mark.arguments))
    return done


def _still_possible(model: OpenELM, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `accelerate` was given; without rounded activations, or weights that are held prepacked
    alone, if no weight is left for them.
    """
    held = (m.compressed() for m in model.modules() if isinstance(m, Compressed))
    if not any(weight.takes_int8 for weight in held):
        arguments = arguments | {"activations": None}
    projections = (model.get_submodule(name) for name in matrices(model, embeddings=False))
    if arguments["prepack"] == ALONE and all(isinstance(m, Compressed) for m in projections):
        arguments = arguments | {"prepack": None, "plan": None}
    return arguments


def plain(module: Compressed, weight: Tensor, padding_index: int | None = None) -> nn.Module:
    """nn.Linear or nn.Embedding that holds weight [n, k], in place of a compressed one."""
    if isinstance(module, CompressedEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=padding_index)
    fresh = nn.Linear(*reversed(weight.shape), bias=False, device="meta", dtype=weight.dtype)
    fresh.weight = nn.Parameter(weight)
    return fresh
