"""What an op is measured against, on the same inputs.

- "reference": the specification, naive eager torch.
- "eager": torch's own fused operations, called as well as one can, if it has some for the op.
- what else the op's record knows: "documents" (one eager call for each varlen document), "torch"
  (`F.linear_cross_entropy` in chunks, if this torch has it), "liger" (Liger-Kernel) and "cce"
  (Apple's cut-cross-entropy), on a GPU, if they are installed and have the op.
- "compiled": `torch.compile` of the reference, if it takes that whole.
"""

from collections.abc import Callable

import torch

from ... import reference
from ...testing.cases import OPS


def baselines(
    op: str, args: tuple, kwargs: dict, device: torch.device, compiled: bool
) -> dict[str, Callable]:
    """{name: function under the op's signature} to measure it against on these inputs."""
    spec = OPS[op]
    plain = spec.adapt(getattr(reference, op))
    found = {"reference": plain, **spec.baselines(args, kwargs, device)}
    if compiled and spec.compiled:
        found["compiled"] = torch.compile(plain, fullgraph=True, dynamic=False)
    return {name: fn for name, fn in found.items() if fn is not None}
