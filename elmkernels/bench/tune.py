"""This machine beside what the kind of its processor decides (`processors`): which rows hold here,
and which to add.

Each choice takes turns with the others; a row holds if what it takes needs at most TOLERANCE times
as long as the best. What every process measures for itself (the projections' routines) has no rows:
`elmkernels info --gemm` shows it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..acceleration.decoder_weights import decoder_weights_of
from ..acceleration.swap import accelerate
from ..backends import COMPOSED, SDPA, choose, defined, implements, traits, usable
from ..generation import groups
from ..openelm.cache import KVCache
from ..openelm.config import OpenELMConfig
from ..openelm.model import OpenELM
from ..ops._attention_choice import attention_backend
from ..ops.decode_step import MAX_BATCH
from ..processors import ATTENTION, GROUPED, KIND, OWN, row
from ..testing.cases import OPS
from ..testing.cases.draw import make
from .ops import closure
from .runners import compress
from .timing import Timing, fingerprint, interleave

TOLERANCE = 1.1
CPU = torch.device("cpu")
FORMATS = {0: "bf16", 12: "packed12", 8: "int8", 4: "int4"}


@dataclass(frozen=True)
class TuneSizes:
    """Tokens of a prompt, layers and width of a model, rows of its batches; for how long each
    choice is timed, and rounds.
    """

    prompt: int = 512
    layers: int = 4
    width: int = 1280
    batches: tuple[int, ...] = (16, 24, 32, 48, 64)
    seconds: float = 0.1
    rounds: int = 5


@dataclass(frozen=True)
class Finding:
    """what: the task in words. taken: what this kind's row takes; best: what was fastest; ratio:
    the time of the first by that of the second, at worst. add: the row to add, if this one doesn't
    hold or there is none; where: the table it belongs to.
    """

    what: str
    taken: str
    best: str
    ratio: float
    own_row: bool
    where: str
    add: str | None

    @property
    def holds(self) -> bool:
        """Whether what is taken here is as fast as the best, or nearly."""
        return self.ratio <= TOLERANCE

    def row(self) -> dict[str, Any]:
        """A line of a table."""
        verdict = "holds" if self.holds else f"{self.best} is faster"
        if self.add is not None and self.holds:
            verdict = "holds, but has no row of this kind"
        taken = {"task": self.what, "taken": self.taken, "best": self.best}
        return taken | {"of the best's time": f"{self.ratio:.2f}x", "the row": verdict}

    def json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"holds": self.holds}


ALONE = tuple(op for op in defined() if not traits(op).whole_model)
TASKS = (*ALONE, *(f"batches, {name}" for name in FORMATS.values()))
SIZES = TuneSizes()


def findings(note: Callable[[str], None] = lambda text: None) -> Iterator[Finding]:
    """Every choice of this kind of processor, measured here; under a minute on two cores. note: is
    told each of TASKS before it is measured.
    """
    sizes, tasks = SIZES, iter(TASKS)
    with torch.inference_mode():
        for op in ALONE:
            note(next(tasks))
            for dtype in (torch.bfloat16, torch.float32):
                yield from _backends(op, dtype, sizes)
        for bits, format in FORMATS.items():
            note(next(tasks))
            yield _grouped(bits, format, sizes)


def _timed(calls: dict[str, Callable[[], object]], sizes: TuneSizes) -> dict[str, Timing]:
    how = {"min_time": sizes.seconds, "rounds": sizes.rounds, "sample_time": 0.01}
    return interleave(calls, warm_up=0.02, **how)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _where() -> str:
    machine = fingerprint(CPU)
    return f"{machine['cpu']}, {machine['threads']} threads"


def _add(key: str, choice: object, why: str) -> str:
    text = f'"{choice}"' if isinstance(choice, str) and choice != OWN else choice
    return f'({KIND!r}, {key}): Row({"OWN" if choice == OWN else text}, "{_where()}: {why}"),'


def _backends(op: str, dtype: torch.dtype, sizes: TuneSizes) -> Iterator[Finding]:
    """Whether the backend that an op takes by itself is the fastest, of few rows and of many."""
    names, composed = usable(op, "cpu"), implements(SDPA, op)
    for case in OPS[op].bench_cases("1_1B", (1, sizes.prompt), -1)[:2]:
        args, kwargs = make(case, dtype)
        fn = getattr(ops, op)

        def call(name: str | None, fn=fn, args=args, kwargs=kwargs) -> Callable[[], object]:
            return closure(lambda *a, **k: fn(*a, **k, backend=name), args, kwargs, False)

        times = _timed({name: call(name) for name in names}, sizes)
        seconds = {name: times[name].median for name in names}
        best = min(seconds, key=seconds.__getitem__)
        what = f"{op}, {case.name}, {_name(dtype)}"
        if composed and case.name.endswith(f"_{sizes.prompt}"):
            yield _prompt(what, dtype, seconds, best)
            continue
        taken = choose(op, "cpu", None)
        ratio = seconds[taken] / seconds[best]
        line = f"{what}: {best} before {taken} ({ratio:.2f}x), {_where()}"
        add = line if ratio > TOLERANCE else None
        yield Finding(what, taken, best, ratio, True, "backends.PREFERENCE", add)


def _prompt(what: str, dtype: torch.dtype, seconds: dict[str, float], best: str) -> Finding:
    """Attention over a prompt, which torch's own may take."""
    taken = attention_backend("cpu", None, "prompt", 64, dtype)
    own = min((n for n in seconds if n not in COMPOSED), key=seconds.__getitem__, default=SDPA)
    ratio, known = seconds[taken] / seconds[best], (KIND, dtype) in ATTENTION
    why = f"{what}: {own} {seconds[SDPA] / seconds[own]:.2f}x as fast as torch's"
    add = None
    if ratio > TOLERANCE or not known:
        add = _add(str(dtype), SDPA if best == SDPA else OWN, why)
    return Finding(what, taken, best, ratio, known, "ATTENTION", add)


def _model(sizes: TuneSizes) -> OpenELM:
    config = OpenELMConfig(
        num_transformer_layers=sizes.layers, model_dim=sizes.width, head_dim=64, num_gqa_groups=4,
        vocab_size=256, ffn_dim_divisor=256, qkv_multipliers=(0.5, 1.0),
        ffn_multipliers=(2.0, 4.0), normalize_qk_projections=True, ffn_with_glu=True,
        share_input_output_layers=True, rope_max_length=256,
    )  # fmt: skip
    return OpenELM.from_config(config, seed=0, dtype=torch.bfloat16).eval()


def _grouped(bits: int, format: str, sizes: TuneSizes) -> Finding:
    """Of batches whose weights have no prepacked copies: in groups, or by the layers."""
    model = compress(format, _model(sizes), progress=False)
    accelerate(model, prepack=False)
    weights = decoder_weights_of(model)
    found = row(GROUPED, bits, torch.bfloat16)
    present = MAX_BATCH if found is None else found.choice
    most, worst, fastest = MAX_BATCH, 1.0, []
    for batch in sizes.batches:
        seconds = _ways(model, weights, batch, sizes)
        best = min(seconds, key=seconds.__getitem__)
        fastest.append(f"{batch} {best}")
        if best == "groups":
            most = batch
        taken = "groups" if batch <= present else "layers"
        worst = max(worst, seconds[taken] / seconds[best])
    known = (KIND, bits, torch.bfloat16) in GROUPED
    why = f"the faster of {', '.join(fastest)}"
    add = None
    if worst > TOLERANCE or not known:
        add = _add(f"{bits}, torch.bfloat16", most, why)
    what = f"batches in groups, {format}"
    taken = f"up to {present} rows"
    return Finding(what, taken, f"up to {most} rows", worst, known, "GROUPED", add)


def _ways(model: OpenELM, weights: Any, batch: int, sizes: TuneSizes) -> dict[str, float]:
    """Seconds of a step of a batch each way."""
    cache = KVCache(model.config, batch, 80, dtype=torch.bfloat16, device=CPU)
    cache.advance(64)
    tokens = torch.arange(batch) % model.config.vocab_size

    def layers() -> Tensor:
        logits = model(tokens[:, None], cache=cache, logits_to_keep=1)
        cache.truncate(64)
        return logits

    times = _timed(
        {"groups": lambda: groups.step(weights, tokens, cache, None), "layers": layers}, sizes
    )
    return {name: t.median for name, t in times.items()}


def lines(found: list[Finding]) -> list[str]:
    """What there is to do, in words."""
    wrong = [f for f in found if f.add is not None]
    if not wrong:
        return [f"every row holds here (within {TOLERANCE}x of the best)"]
    text = []
    for where in dict.fromkeys(f.where for f in wrong):
        place = where if "." in where else f"processors.{where}"
        text.append(f"rows to add to {place}:")
        text += [f"  {f.add}" for f in wrong if f.where == where]
    return text
