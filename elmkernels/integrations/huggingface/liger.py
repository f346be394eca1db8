"""`TrainingArguments(use_liger_kernel=True)`: what Liger does with a model of ours.

Liger looks a model's type up in a table of functions that put its kernels in. For OpenELM the
function accelerates: Liger has no kernels for layers that differ in their heads.
"""

from importlib.util import find_spec
from typing import Any

from ...checks import fail
from .loading import AUTO, LoadsAndSaves

# Which of Liger's switches are ours, and that they can't be turned off one by one.
_OURS = ("rope", "swiglu", "rms_norm", "fused_linear_cross_entropy")


def put_in(model: Any = None, **switches: bool) -> None:
    """Accelerate a model, unless it is.

    Args:
        model: an `OpenELMForCausalLM`.
        switches: Liger's.

    Raises:
        TypeError: model is something else.
        ValueError: a switch turns off one of the kernels.
    """
    if not isinstance(model, LoadsAndSaves):
        fail("model", "an OpenELMForCausalLM", type(model).__name__, TypeError)
    for name in _OURS:
        if switches.get(name) is False:
            fail(name, "True: accelerate puts all kernels in", False)
    if model.report is None:
        model.accelerate(AUTO)


def register() -> None:
    """Tell Liger of the function, if Liger is installed."""
    if find_spec("liger_kernel") is None:
        return
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception:  # a Liger that this machine or this transformers can't import
        return
    MODEL_TYPE_TO_APPLY_LIGER_FN["openelm"] = put_in
