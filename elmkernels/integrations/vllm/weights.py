"""Stored tensors under the names that they have in vLLM's model; nothing here knows vLLM.

The modules keep the names of Apple's folders (`transformer.layers.0.attn.qkv_proj`), so that
adapters trained elsewhere find them. A stored qkv_proj or proj_1 is whole, and vLLM cuts it.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from ...checks import fail
from ...openelm.config import OpenELMConfig

PREFIX = "transformer."
HEAD = "lm_head.weight"


def target(name: str) -> str:
    """The name of a stored tensor in vLLM's model: CoreNet's own and Apple's are taken."""
    bare = name.removeprefix(PREFIX)
    if bare == "classifier.weight" or bare == HEAD:
        return HEAD
    return PREFIX + bare


def expected(shape: OpenELMConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model by their names in vLLM's."""
    return {target(name): size for name, size in shape.parameter_shapes().items()}


def mapped(
    shape: OpenELMConfig, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor under its name in vLLM's model.

    Args:
        shape: of the model.
        weights: (stored name, tensor), in any order.

    Yields:
        (name, tensor). The output projection of a model that shares its embedding is passed over.

    Raises:
        ValueError: a tensor is none of the model's, or has another shape.
    """
    wanted = expected(shape)
    for stored, weight in weights:
        name = target(stored)
        if name == HEAD and name not in wanted:
            continue
        if name not in wanted:
            fail(stored, "a tensor of the model", f"{list(weight.shape)} that it doesn't have")
        if tuple(weight.shape) != wanted[name]:
            fail(stored, list(wanted[name]), list(weight.shape))
        yield name, weight


def check_complete(
    shape: OpenELMConfig, held: Iterable[str], loaded: Iterable[str], folder: str
) -> None:
    """Raise ValueError unless all that a process holds of a model was loaded: a projection that a
    folder lacks would be served with whatever memory held before.

    Args:
        shape: of the model.
        held: the names of the process's own parameters.
        loaded: those that got a tensor.
        folder: its name.
    """
    lacks = sorted((set(held) & expected(shape).keys()) - set(loaded))
    if lacks:
        more = f" and {len(lacks) - 4} more" if len(lacks) > 4 else ""
        raise ValueError(f"{folder} lacks {', '.join(lacks[:4])}{more}")
