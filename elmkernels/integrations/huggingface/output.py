"""What a forward pass with labels returns: the loss at once, the logits when they are asked for.

The fused loss makes no logits. A trainer asks for the loss alone; a loop of one's own, or a metric,
that reads `output.logits` gets them by one more product with the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class DeferredLogits(CausalLMOutputWithPast):
    """An output whose logits are made at their first use, by `make_logits`."""

    make_logits: Callable[[], Tensor] | None = None

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name != "logits" or value is not None:
            return value
        make = super().__getattribute__("make_logits")
        if make is not None:
            value = make()
            self.logits = value
        return value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """Its values that are not None, the logits among them."""
        found = {"loss": self.loss, "logits": self.logits, **self}
        found.pop("make_logits", None)
        return tuple(value for value in found.values() if value is not None)
