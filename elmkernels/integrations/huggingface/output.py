"""What a forward pass with labels returns: the loss at once, the logits when they are asked for.

The fused loss makes no logits. A trainer asks for the loss alone; a loop of one's own, or a metric,
that reads `output.logits` gets them by one more product with the head.
"""

from transformers.modeling_outputs import CausalLMOutputWithPast

from ...acceleration.models import deferring

DeferredLogits = deferring(CausalLMOutputWithPast)
