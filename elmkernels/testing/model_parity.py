"""Whether a whole accelerated model computes what the reference model computes, on a few tokens.

The same, already rounded weights and token ids go through three models: the reference in a wider
dtype (truth: float64 for float32, float32 for the half types), the reference in the working dtype
(the yardstick) and the accelerated one. Its logits, the loss of every token and the gradient of
every parameter are held to the rule of `testing.parity`:

    max error <= 2 x yardstick's + 1 ulp of the largest truth
    rms error <= 1.5 x yardstick's + 4 eps32 x truth's rms

Rounding in a deep model is chaotic, and a small parameter (64 weights of a QK norm) is a small
sample of it: now and then its own yardstick is small by luck. So the yardstick of a parameter is
never taken below the largest, relative to truth, of its kind over the layers. The mean loss is one
number, whose yardstick luck can make 0: the losses are compared token by token, which bounds it.

In float32 the projections of the accelerated model may run in another library than the reference's,
which sums thousands of products in another order and with a larger error (oneDNN's against MKL's).
Where they do, float32 may take 4 x the yardstick in both rules.

Logits come from three passes: with gradients, without, and token by token through a cache. Losses
and gradients are those of `loss`, which the accelerated model computes without logits. Greedy
tokens must be the reference's up to a tie: where they part for the first time, the two tokens'
logits in the reference may differ by no more than the errors allowed to two logits.

Where memory can't hold truth, there is a weaker rule, named in the result: the accelerated model is
held to the reference in the working dtype, and both the rms and the largest difference may be
32 eps (half types) or 256 eps (float32) of the reference's; that is about four times by how much
two correct computations of OpenELM-270M differ. It finds a wrong kernel, not a careless rounding.
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..acceleration.routines import LINEAR, Plan
from ..generation.step import greedy, next_logits
from ..openelm.cache import KVCache
from ..openelm.config import OpenELMConfig
from ..openelm.loss import next_tokens
from ..openelm.model import OpenELM
from .rule import FACTORS, Comparison, compare, relative_errors

DECODED = 8  # tokens that go one by one through a cache for their logits
OTHER_SUMS = (4.0, 4.0)  # times the yardstick's max and rms error
WITH, WITHOUT = "with gradients", "without"
INFERENCE = ("logits, no gradients", "logits, cached")


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding of both models: how many tokens agree from the start, and why it matters."""

    steps: int
    rows: int
    equal: int
    gap: float
    gap_allowed: float

    @property
    def ok(self) -> bool:
        return self.gap <= self.gap_allowed


@dataclass(frozen=True)
class ModelParity:
    """The verdict on a accelerated model in one dtype."""

    dtype: str
    truth: str | None
    rule: str
    shape: tuple[int, int]
    comparisons: list[Comparison]
    losses: dict[str, float]
    greedy: Greedy

    @property
    def ok(self) -> bool:
        return self.greedy.ok and all(c.ok for c in self.comparisons)

    @property
    def kinds(self) -> dict[str, list[Comparison]]:
        """The comparisons by kind: one of each layer, or one of the model."""
        found: dict[str, list[Comparison]] = {}
        for c in self.comparisons:
            found.setdefault(_kind(c.what), []).append(c)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A line of a table for every kind: its worst tensor, and the verdict on all of them."""
        lines = []
        for kind, members in self.kinds.items():
            worst = max(members, key=lambda c: (not c.ok, c.used))
            where = re.search(r"layers\.(\d+)\.", worst.what)
            bad = sum(not c.ok for c in members)
            lines.append(
                {
                    "tensor": kind,
                    "count": len(members),
                    "worst in": f"layer {where[1]}" if where else "",
                    "max error": worst.max_error,
                    "allowed": worst.max_allowed,
                    "rms error": worst.rms_error,
                    "rms allowed": worst.rms_allowed,
                    "rms / eager": worst.ratio if self.truth else None,
                    "parity": f"FAILED ({bad}): {worst.reason}" if bad else "ok",
                }
            )
        return lines

    def json(self) -> dict[str, Any]:
        """Everything compared, for a file."""
        return asdict(self) | {"ok": self.ok}


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of truth."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def truth_bytes(config: OpenELMConfig, dtype: torch.dtype, positions: int) -> int:
    """About the most that truth needs at once: its weights and gradients, or its gradients beside
    two more in the working dtype; and the logits of all positions a few times over.
    """
    wide = wider(dtype).itemsize
    weights = config.num_parameters * (wide + max(wide, 2 * dtype.itemsize))
    return weights + 4 * wide * positions * config.vocab_size + (1 << 30)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        found += [int(line[1]) << 10 for line in lines if line[0] == "MemAvailable:"]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    return min(found, default=None)


def check_model(
    reference: OpenELM, accelerated: OpenELM, input_ids: Tensor, steps: int,
    plan: Plan | None = None, truth: bool | None = None,
) -> ModelParity:  # fmt: skip
    """Compare a model with its accelerated `twin` on input_ids [batch, length] and on `steps`
    greedy
    tokens. plan: the routines of the accelerated model's projections; None for F.linear everywhere.
    truth: whether to compute it; None for wherever memory holds it.
    """
    dtype = reference.token_embeddings.weight.dtype
    if truth is None:
        free = free_bytes(input_ids.device)
        needed = truth_bytes(reference.config, dtype, input_ids.numel())
        truth = free is None or needed <= free
    expected = _everything(_widened(reference), input_ids) if truth else None
    yardstick = _everything(reference, input_ids)
    got = _everything(accelerated, input_ids)
    losses = {
        name: float(found["token losses"].double().mean())
        for name, found in (("truth", expected), ("eager", yardstick), ("accelerated", got))
        if found is not None
    }
    if truth:
        factors = _factors(plan or Plan(), dtype)
        floors = _floors(expected, yardstick)
        comparisons = [
            compare(
                expected.pop(k),
                yardstick.pop(k),
                got.pop(k),
                k,
                factors=factors[WITHOUT if k in INFERENCE else WITH],
                floor=floors[_kind(k)],
            )
            for k in list(got)
        ]
        rule = "max <= 2 x eager's + 1 ulp, rms <= 1.5 x eager's + 4 eps32 x rms"
        if OTHER_SUMS in factors.values():
            loose = " and ".join(where for where, f in factors.items() if f == OTHER_SUMS)
            rule += f"; 4 x where projections sum in another order: {loose}"
    else:
        limit = 256 if dtype == torch.float32 else 32
        comparisons = [_direct(yardstick.pop(k), got.pop(k), k, dtype, limit) for k in list(got)]
        rule = f"weak, as memory holds no truth: within {limit} eps of eager's rms and maximum"
    logits = next(c for c in comparisons if c.what == "logits")
    allowed = 2 * (logits.max_allowed + logits.yardstick_max)
    return ModelParity(
        _name(dtype),
        _name(wider(dtype)) if truth else None,
        rule,
        tuple(input_ids.shape),
        comparisons,
        losses,
        _compare_greedy(reference, accelerated, input_ids, steps, allowed),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(what: str) -> str:
    return re.sub(r"layers\.\d+\.", "", what)


def _widened(model: OpenELM) -> OpenELM:
    wide = wider(model.token_embeddings.weight.dtype)
    truth = OpenELM(model.config, device="meta")
    weights = {name: weight.to(wide) for name, weight in model.state_dict().items()}
    truth.load_state_dict(weights, assign=True)
    return truth


def _everything(model: OpenELM, input_ids: Tensor) -> dict[str, Tensor]:
    """{"logits": ..., "token losses": ..., "grad norm.weight": ...} of one model."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(input_ids).detach()
    targets = next_tokens(input_ids)
    losses = model.loss(input_ids, targets, reduction="none").detach()[:, :-1].flatten()
    grads = torch.autograd.grad(model.loss(input_ids, targets), parameters)
    one = input_ids[:1]
    with torch.inference_mode():
        once = model(one)
        stepped = _token_by_token(model, one)
    found = {"logits": logits, **dict(zip(INFERENCE, (once, stepped), strict=True))}
    found["token losses"] = losses
    return found | {f"grad {name}": g for name, g in zip(names, grads, strict=True)}


def _token_by_token(model: OpenELM, input_ids: Tensor) -> Tensor:
    """The logits of the last DECODED positions, each from a pass of its own after the rest."""
    length = input_ids.shape[1]
    first = max(1, length - DECODED)
    cache = KVCache(model.config, 1, length, dtype=model.activation_dtype, device=input_ids.device)
    logits = [model(input_ids[:, :first], cache=cache, logits_to_keep=1)]
    logits += [next_logits(model, input_ids[:, i], cache)[:, None] for i in range(first, length)]
    return torch.cat(logits, dim=1)


def _factors(plan: Plan, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """What the rule allows passes with gradients and passes without."""
    if dtype != torch.float32:
        return {WITH: FACTORS, WITHOUT: FACTORS}
    return {
        WITH: FACTORS if plan.training == LINEAR else OTHER_SUMS,
        WITHOUT: FACTORS if plan.inference == {LINEAR} else OTHER_SUMS,
    }


def _floors(
    truth: dict[str, Tensor], yardstick: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """{kind: the largest of its yardsticks over the layers, relative to truth}."""
    found: dict[str, tuple[float, float]] = {}
    for what, expected in truth.items():
        max_error, rms_error = relative_errors(expected, yardstick[what])
        largest = found.get(_kind(what), (0.0, 0.0))
        found[_kind(what)] = max(largest[0], max_error), max(largest[1], rms_error)
    return found


def _direct(
    reference: Tensor, candidate: Tensor, what: str, dtype: torch.dtype, limit: int
) -> Comparison:
    """The weak rule: `compare` says how far the two are apart, the limits are its own."""
    c = compare(reference.double(), reference, candidate, what)
    allowed = limit * torch.finfo(dtype).eps
    c = replace(c, max_allowed=allowed * c.truth_max, rms_allowed=allowed * c.truth_rms)
    if c.max_error == math.inf:  # it can't be measured, for the reason that c has
        return c
    too_far = f"differs by {c.used * limit:.3g} eps of eager's, at most {limit} allowed"
    return replace(c, reason=None if c.used <= 1 else too_far)


@torch.inference_mode()
def _compare_greedy(
    reference: OpenELM, accelerated: OpenELM, prompt: Tensor, steps: int, allowed: float
) -> Greedy:
    expected, got = (greedy(model, prompt, steps) for model in (reference, accelerated))
    return compare_tokens(reference, prompt, expected, got, allowed)


@torch.inference_mode()
def compare_tokens(
    reference: OpenELM, prompt: Tensor, expected: Tensor, got: Tensor, allowed: float
) -> Greedy:
    """Tokens [batch, steps] after prompts [batch, length], held to the reference's own up to a tie:
    allowed is by how much its logits of two tied tokens may differ.
    """
    rows, steps = expected.shape
    equal, gap = steps, 0.0
    for row in range(rows):
        apart = (expected[row] != got[row]).nonzero()
        if not len(apart):
            continue
        at = int(apart[0])
        equal = min(equal, at)
        before = torch.cat((prompt[row], expected[row, :at]))[None]
        logits = reference(before, logits_to_keep=1)[0, -1].double()
        gap = max(gap, float(logits[expected[row, at]] - logits[got[row, at]]))
    return Greedy(steps, rows, equal, gap, allowed)
