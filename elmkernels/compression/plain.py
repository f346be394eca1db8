"""Compressed weights made plain again, whichever form they are in."""

from torch import nn

from ..acceleration.layout import native
from ..openelm.compressed import Compressed
from ..openelm.model import OpenELM
from .conversion import Conversion, convert, dense_weight, plain


def make_plain(model: OpenELM, *, progress: bool = True) -> Conversion:
    """Give a model plain matrices, in place: a packed12 one's exact weights, a quantized one's
    values in the dtype of its scales.

    Args:
        model: an `elmkernels.OpenELM`; one whose weights are plain already stays as it is.
        progress: whether to show it on a terminal.

    Returns:
        A Conversion: how many matrices, bytes before and after.

    Raises:
        TypeError: the model is another one.
    """
    found = native(model)
    padding = found.config.padding_index if isinstance(found, OpenELM) else None

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Compressed):
            return None
        return plain(module, dense_weight(module), padding)

    return convert(model, True, "made plain", lambda name, module: None, make, progress)
