"""OpenELM in transformers: `AutoModelForCausalLM.from_pretrained` on this package's kernels.

    import elmkernels.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("OpenELM-270M")

Importing it registers the configuration, the model and an implementation of attention
("elmkernels") with transformers; nothing of transformers is changed. It needs the extra `hf`.
"""

from .versions import check_versions

check_versions()

from ...generation.chat import TEMPLATE as CHAT_TEMPLATE  # noqa: E402
from .attention import register as _register_attention  # noqa: E402
from .cache import OpenELMCache  # noqa: E402
from .configuration import OpenELMConfig  # noqa: E402
from .contrastive import contrastive_search  # noqa: E402
from .liger import register as _register_with_liger  # noqa: E402
from .modeling import OpenELMForCausalLM  # noqa: E402
from .registration import register as _register_classes  # noqa: E402

__all__ = [
    "CHAT_TEMPLATE", "OpenELMCache", "OpenELMConfig", "OpenELMForCausalLM", "contrastive_search",
]  # fmt: skip

_register_attention()
_register_classes()
_register_with_liger()
