"""What activations that are rounded to 8 bits cost: an error of logits, a perplexity."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..acceleration.swap import accelerate
from ..generation.session import generate
from ..openelm.model import OpenELM
from ..surgery import twin


@torch.inference_mode()
def rounding_loss(rounded: OpenELM, tokens: int) -> dict[str, float]:
    """What a model loses by activations that are rounded: by how much its logits differ, relative
    to their rms, and its perplexity, beside what it is without, of a text that it draws without.
    """
    exact = twin(rounded)
    accelerate(exact)
    (row,) = generate(exact, [[1]], tokens, temperature=1.0, seed=0, stop_tokens=())
    ids = torch.tensor([[1, *row.tokens]])
    found, truth = (m(ids)[0].float() for m in (rounded, exact))
    difference = found - truth

    def perplexity(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:-1], ids[0, 1:]).exp())

    return {
        "logits_rms": float(difference.square().mean().sqrt() / truth.square().mean().sqrt()),
        "logits_max": float(difference.abs().max() / truth.square().mean().sqrt()),
        "perplexity": perplexity(found),
        "perplexity_without": perplexity(truth),
    }
