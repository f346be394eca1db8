"""What a GPU is to reach, as a table, and whether a check's results do: from the results alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from ..bench.benchmark import COMPILED, EAGER
from ..bench.benchmark import Results as Found
from .runners import (
    COMPILED_OLMO,
    CUBLAS_GRAPH,
    GRAPH,
    OLMO,
    ONE_LAUNCH,
    OTHER_FORMS,
    SDPA_GRAPH,
)

GRAPHS = (GRAPH, SDPA_GRAPH, CUBLAS_GRAPH)
DECODERS = (*GRAPHS, ONE_LAUNCH)
LARGE = 64 << 20  # bytes: from here on memory, not caches, is what is measured
MANY_TOKENS = 16384
FEW_ROWS = (1, 4, 16)
NORMS = ("rms_norm", "add_rms_norm")
NOT_MEASURED, REACHED, MISSED = "not measured", "reached", "missed"


@dataclass(frozen=True)
class Target:
    """measure gives a number of results, or None; it is to be at least `wanted`, or at most."""

    what: str
    wanted: float
    unit: str
    measure: Callable[[Found], float | None]
    most: bool = False


def all_units(results: Found, stage: str) -> dict[str, Found]:
    """A stage's units by name; none if it hasn't begun."""
    return results["stages"].get(stage, {}).get("units", {})


def timed(results: Found, *stages: str) -> dict[str, Found]:
    """The units of whole models that were measured, of these stages or all."""
    found: dict[str, Found] = {}
    for stage in stages or ("decode", "compiled", "models"):
        found |= {n: u for n, u in all_units(results, stage).items() if "times" in u}
    return found


def _short(results: Found, model: str) -> list[Found]:
    """Decoding of one sequence of a model after the shortest prompt."""
    units = [u for u in timed(results).values() if u.get("steps") and u["batch"] == 1]
    units = [u for u in units if u["model"] == model]
    shortest = min((u["context"] for u in units), default=0)
    return [u for u in units if u["context"] == shortest]


def _best(unit: Found, names: Iterable[str]) -> float | None:
    rates = unit["tokens_per_second"]
    return max((rates[n] for n in names if n in rates), default=None)


def _rate(model: str, names: Iterable[str], results: Found) -> float | None:
    return next((r for u in _short(results, model) if (r := _best(u, names))), None)


def _of_floor(model: str, names: Iterable[str], results: Found) -> float | None:
    """Of the floor by the datasheet, or, of a GPU that has none here, by the memory as measured."""
    for unit in _short(results, model):
        if rate := _best(unit, names):
            measured = None if unit.get("ceiling_missing") else unit["floor_tokens"]
            floor = unit["datasheet_tokens"] or measured
            return None if floor is None else rate / floor
    return None


def _times(model: str, names: Iterable[str], baseline: str, results: Found) -> float | None:
    """How many times faster the best of names is than a baseline, both in one unit."""
    for unit in _short(results, model):
        ours, theirs = _best(unit, names), _best(unit, (baseline,))
        if ours and theirs:
            return ours / theirs
    return None


def _benches(results: Found, ops: Iterable[str], backward: bool = False) -> list[Found]:
    units = [u for u in all_units(results, "ops").values() if "ratios" in u]
    return [u for u in units if u["op"] in ops and u["backward"] == backward]


def _worst(
    units: Iterable[Found], value: Callable[[Found], float | None], most: bool = False
) -> float | None:
    """The worst over cases of the best backend's value."""
    cases: dict[tuple, list[float]] = {}
    for u in units:
        if (x := value(u)) is not None:
            cases.setdefault((u["op"], u["case"], u["dtype"]), []).append(x)
    if most:
        return max((min(found) for found in cases.values()), default=None)
    return min((max(found) for found in cases.values()), default=None)


def _share(unit: Found) -> float | None:
    """Of the bandwidth that the maker promises, or, if that isn't known, of a copy's; None if the
    copy was slower than the op, which is then no ceiling.
    """
    if unit["of_datasheet"] is not None:
        return unit["of_datasheet"]
    return None if unit["of_copy"] > 1 else unit["of_copy"]


def _large(op: str, results: Found) -> float | None:
    return _worst((u for u in _benches(results, (op,)) if u["nbytes"] >= LARGE), _share)


def _backward(op: str, results: Found) -> float | None:
    """Of the backward alone: what both passes take beyond the forward."""
    forward = {_key(u): u for u in _benches(results, (op,)) if u["nbytes"] >= LARGE}

    def share(unit: Found) -> float | None:
        first = forward.get(_key(unit))
        reached = _share(unit)
        if first is None or reached is None:
            return None
        seconds = unit["time"]["median"] - first["time"]["median"]
        peak = unit["bandwidth"] / reached
        return (unit["nbytes"] - first["nbytes"]) / seconds / peak if seconds > 0 else None

    return _worst(_benches(results, (op,), backward=True), share)


def _key(unit: Found) -> tuple:
    return unit["case"], unit["dtype"], unit["backend"]


def _many_tokens(op: str, results: Found) -> float | None:
    return _worst((u for u in _benches(results, (op,)) if u["rows"] >= MANY_TOKENS), _share)


def _beside_compiled(op: str, results: Found) -> float | None:
    both = [u for backward in (False, True) for u in _benches(results, (op,), backward)]
    found = {id(u): u["ratios"].get("compiled") for u in both}
    passes = [[u for u in both if u["backward"] == b] for b in (False, True)]
    worst = [_worst(units, lambda u: found[id(u)]) for units in passes]
    return min((x for x in worst if x is not None), default=None)


def _token(results: Found) -> float | None:
    units = _benches(results, ("attention",))
    return _worst((u for u in units if "_token_" in u["case"] and u["nbytes"] >= LARGE), _share)


def _few_rows(results: Found) -> float | None:
    units = [u for u in _benches(results, NORMS) if u["rows"] in FEW_ROWS]
    return _worst(units, lambda u: u["time"]["median"] * 1e6, most=True)


RATE, SHARE, TIMES, MICROSECONDS = "tokens/s", "%", "x", "us"
DECODE = "decoding one sequence in bfloat16: "
TARGETS = (
    Target(f"{DECODE}1_1B by graph, an H200's", 1220, RATE, partial(_rate, "1_1B", GRAPHS)),
    Target(f"{DECODE}1_1B by graph, of the floor", 0.55, SHARE,
           partial(_of_floor, "1_1B", GRAPHS)),
    Target(f"{DECODE}1_1B by one launch, an H200's", 1670, RATE,
           partial(_rate, "1_1B", (ONE_LAUNCH,))),
    Target(f"{DECODE}1_1B by one launch, of the floor", 0.75, SHARE,
           partial(_of_floor, "1_1B", (ONE_LAUNCH,))),
    Target(f"{DECODE}270M", 3000, RATE, partial(_rate, "270M", DECODERS)),
    *(Target(f"{DECODE}{model} beside {baseline}", wanted, TIMES,
             partial(_times, model, DECODERS, baseline))
      for baseline, wanted in ((EAGER, 10), (COMPILED, 2)) for model in ("1_1B", "270M")),
    *(Target(f"{DECODE}1_1B beside {baseline}", 1, TIMES,
             partial(_times, "1_1B", DECODERS, baseline))
      for baseline in (OLMO, COMPILED_OLMO)),
    *(Target(f"{model} {form} beside its own bfloat16, one launch", wanted, TIMES,
             partial(_times, model, (OTHER_FORMS[form],), ONE_LAUNCH))
      for form, wanted in (("int8", 1.7), ("int4", 2.6), ("packed12", 1.2))
      for model in ("1_1B", "270M")),
    Target("rms_norm from 64 MiB on, of the peak", 0.85, SHARE, partial(_large, "rms_norm")),
    Target("rms_norm's backward from 64 MiB on, of the peak", 0.70, SHARE,
           partial(_backward, "rms_norm")),
    Target("qk_norm_rope from 16384 tokens on, of the peak", 0.80, SHARE,
           partial(_many_tokens, "qk_norm_rope")),
    Target("qk_norm_rope beside torch.compile", 1, TIMES,
           partial(_beside_compiled, "qk_norm_rope")),
    Target("attention of a token from 64 MiB of keys and values on, of the peak", 0.80, SHARE,
           _token),
    Target("norms of 1 to 16 rows", 2.5, MICROSECONDS, _few_rows, most=True),
)  # fmt: skip


def verdicts(results: Found) -> list[Found]:
    """A row for each target: what is wanted, what was measured (on a GPU), and how it stands."""
    measured = results.get("device", "").startswith("cuda")
    return [_row(t, t.measure(results) if measured else None) for t in TARGETS]


def _row(target: Target, got: float | None) -> Found:
    row = {"target": target.what, "wanted": _text(target, target.wanted, True)}
    if got is None:
        return row | {"measured": "", "verdict": NOT_MEASURED}
    good = got <= target.wanted if target.most else got >= target.wanted
    return row | {"measured": _text(target, got), "verdict": REACHED if good else MISSED}


def _text(target: Target, value: float, wanted: bool = False) -> str:
    if target.unit == SHARE:
        text = f"{value:.0%}" if wanted else f"{value:.1%}"
    elif target.unit == RATE:
        text = f"{value:.0f} {RATE}"
    else:
        text = f"{value:.3g}{'x' if target.unit == TIMES else f' {target.unit}'}"
    return f"at {'most' if target.most else 'least'} {text}" if wanted else text
