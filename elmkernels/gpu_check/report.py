"""What a GPU check found, as markdown and as pictures: wins and losses in one table."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..bench import chart
from ..bench.benchmark import ACCELERATED
from ..bench.benchmark import Results as Found
from ..bench.table import markdown, share
from .runners import CUBLAS_GRAPH, GRAPH, ONE_LAUNCH, OTHER_FORMS, SDPA_GRAPH
from .stages import DONE, FAILED
from .targets import all_units, timed, verdicts

OURS = (ACCELERATED, GRAPH, SDPA_GRAPH, CUBLAS_GRAPH, ONE_LAUNCH)  # in the weights of the baselines
FORMS = tuple(OTHER_FORMS.values())
MOST = 12  # rows of what is named one by one
MOST_PANELS = 24


def summary(results: Found) -> str:
    """The whole report; a part that hasn't run yet is absent."""
    parts = [_head(results), _states(results)]
    parts += [part(results) for part in (_targets, _parity, _generation, _models, _ops, _left_out)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Found) -> str:
    m = all_units(results, "machine").get("facts", {})
    lines = ["# GPU check", ""]
    if not results["complete"]:
        lines += ["**Stopped early: what follows is what was done by then.**", ""]
    where = m.get("gpu") or f"a CPU ({m.get('cpu', 'unknown')}): a rehearsal, no figure of a GPU"
    lines.append(f"On {where}; torch {m.get('torch')}, triton {m.get('triton')}.")
    if "memory" in m:
        lines.append(
            f"Compute capability {m['capability']}, {m['memory']['total'] / 2**30:.0f} GiB, CUDA "
            f"{m['cuda']}; the CUDA library is built for {', '.join(m['built_for']) or 'unknown'}."
        )
    lines += [f"**{results['busy']}**"] if results.get("busy") else []
    lines += [f"- {n}: {why}" for n, why in m.get("backends", {}).items() if why]
    return "\n".join(lines)


def _states(results: Found) -> str:
    rows = []
    for name, stage in results["stages"].items():
        units = stage["units"].values()
        rows.append(
            {
                "stage": name,
                "seconds": stage["seconds"],
                "done": sum(u["state"] == DONE for u in units),
                "parity failed": sum(u.get("ok") is False for u in units),
                "raised": sum(u["state"] == FAILED for u in units),
                "left out": len(stage["left_out"]),
            }
        )
    errors = [
        f"- {stage}, {name}: {u.get('error', u['state'])}"
        for stage, found in results["stages"].items()
        for name, u in found["units"].items()
        if u["state"] != DONE
    ]
    return "\n".join(["## Stages", "", markdown(rows), *([""] if errors else []), *errors])


def _targets(results: Found) -> str:
    rows = verdicts(results)
    note = "The peak is what the maker promises, or, of a GPU whose datasheet isn't here, a copy's."
    return "\n".join(["## Targets", "", note, "", markdown(rows)])


def _parity(results: Found) -> str:
    rows, failed = [], []
    units = all_units(results, "parity") | all_units(results, "other-parity")
    for unit in units.values():
        for dtype, d in unit.get("dtypes", {}).items():
            line = {"op": unit["op"], "backend": unit["backend"], "dtype": dtype}
            line |= {"cases": d["run"], "failed": d["failed"]}
            rows.append(line | {"largest share of what is allowed": d["worst"]})
        failed += unit.get("failed", [])
    if not rows:
        return ""
    wanted = sum(u.get("wanted", 0) for u in units.values())
    lines = ["## Parity", "", f"{sum(r['cases'] for r in rows)} of {wanted} cases.", ""]
    lines.append(markdown(rows))
    if failed:
        lines += ["", f"Failed ({len(failed)}):", "", markdown(failed[:MOST])]
    watched = all_units(results, "sanitizer").get("memcheck", {})
    if "tool" in watched:
        code = watched.get("code")
        lines += ["", f"memcheck: {watched['tool']}; exit code {code} of the few cases."]
    return "\n".join(lines)


def _generation(results: Found) -> str:
    rows = []
    for name, u in all_units(results, "generation").items():
        tokens = u["parity"]["greedy"] if "parity" in u else u.get("tokens", u)
        if "equal" not in tokens:
            continue
        row = {"model": name, "parity": "ok" if u["ok"] else "FAILED"}
        row["equal"] = f"{tokens['equal']} of {tokens['steps']}"
        row["captured"] = u.get("captured")
        rows.append(row | {"decode_step": u.get("decode_step")})
    note = "Greedy tokens equal to the reference's, up to a tie; of packed12 weights steps whose "
    note += "logits are those of plain ones, bit for bit."
    return "\n".join(["## Generation", "", note, "", markdown(rows)]) if rows else ""


def _ops(results: Found) -> str:
    rows, lost = [], []
    for name, u in all_units(results, "ops").items():
        if "ratios" not in u:
            continue
        row = {"op": u["op"] + (" fwd+bwd" if u["backward"] else ""), "case": u["case"]}
        row |= {"dtype": u["dtype"], "backend": u["backend"], "us": u["time"]["median"] * 1e6}
        row |= {"GB/s": u["bandwidth"] / 1e9, "of copy": share(u["of_copy"])}
        promised = u["of_datasheet_flops"] or u["of_datasheet"]
        row["of datasheet"] = None if promised is None else share(promised)
        row |= {f"x {baseline}": ratio for baseline, ratio in u["ratios"].items()}
        calls = u["calls"].get(u["backend"])
        row["call us"] = None if calls is None else calls["median"] * 1e6
        rows.append(row | {"parity": "ok" if u["parity"] else "FAILED"})
        lost += [f"{name}: {baseline} {x:.2f}x" for baseline, x in u["ratios"].items() if x < 1]
    if not rows:
        return ""
    note = "Times of the work itself (graphs over rotated buffers on a GPU); `x` is how many times "
    lines = ["## Ops", "", note + "faster than the baseline.", "", markdown(rows), ""]
    return "\n".join(lines + _losses(lost))


def _models(results: Found) -> str:
    rows, lost, absent = [], [], []
    for name, u in timed(results).items():
        rates = u["tokens_per_second"]
        mine = {n: rates[n] for n in OURS if n in rates}
        best = max(mine, key=mine.get)
        for i, (who, rate) in enumerate(rates.items()):
            ratio = mine[best] / rate
            row = {"task": "" if i else name, "runner": who, "tokens/s": rate}
            other = "OLMo" in who or who in FORMS
            row["ours is"] = "" if who in (*OURS, *FORMS) else f"{ratio:.2f}x"
            row["of floor"] = "" if other else _of_floor(rate, u)
            if who in FORMS and ONE_LAUNCH in rates:
                row["x own bfloat16"] = f"{rate / rates[ONE_LAUNCH]:.2f}x"
            row["floor"] = None if i or _unusable(u) else u["floor_tokens"]
            row["datasheet floor"] = None if i else u["datasheet_tokens"]
            agree = u.get("agree", {}).get(who)
            row["tokens equal"] = None if agree is None else f"{agree} of {u['tokens_each']}"
            rows.append(row)
            if who not in (*OURS, *FORMS) and ratio < 1:
                lost.append(f"{name}: {who}, {best} is {ratio:.2f}x")
        absent += [f"- {name}: {who}: {why}" for who, why in u["missing"].items()]
    if not rows:
        return ""
    note = (
        "bfloat16, random weights; `ours is`: how many times faster the best of "
        f"{', '.join(map(repr, OURS))} is. Floors in tokens/s: the least bytes or operations of "
        "the task at the speed measured in the same rounds, and at what the maker promises. "
        "OLMo-1B holds other weights: another work a token."
    )
    lines = ["## Models", "", note, "", markdown(rows), "", *_losses(lost)]
    return "\n".join(lines + (["", "Missing:", "", *absent] if absent else []))


def _losses(lost: Sequence[str]) -> list[str]:
    if not lost:
        return ["Losses: none."]
    return [f"Losses ({len(lost)}), below 1 ours is slower:", "", *(f"- {text}" for text in lost)]


def _left_out(results: Found) -> str:
    found = [
        f"- {stage}: {', '.join(names[:MOST])}{_more(names)}: {why}"
        for stage, entry in results["stages"].items()
        for why, names in _by_reason(entry["left_out"].items())
    ]
    return "\n".join(["## Left out", "", *found]) if found else ""


def _by_reason(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, list[str]]]:
    reasons: dict[str, list[str]] = {}
    for name, why in pairs:
        reasons.setdefault(why, []).append(name)
    return reasons.items()


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - MOST} more" if len(names) > MOST else ""


def _unusable(unit: Found) -> bool:
    """Whether more was reached than the ceiling that the floor is from."""
    return unit.get("ceiling_missing") is not None


def _of_floor(rate: float, unit: Found) -> str:
    return share(None if _unusable(unit) else rate / unit["floor_tokens"])


def draw(results: Found, folder: Path) -> list[str]:
    """models.png and ops.png; returns the names of those that there were figures for."""
    where = all_units(results, "machine").get("facts", {}).get("gpu") or "a CPU, in small form"
    models = [
        {
            "task": name,
            "rates": u["tokens_per_second"],
            "ceiling": None if _unusable(u) else u["floor_tokens"],
        }
        for name, u in timed(results).items()
    ]
    ops = [_op_panel(name, u) for name, u in all_units(results, "ops").items() if "ratios" in u]
    pictures = {
        "models.png": (models, "tokens/s", "the measured ceiling"),
        "ops.png": (ops[:MOST_PANELS], "GB/s", "a copy of as many bytes"),
    }
    drawn = []
    for name, (tasks, unit, ceiling) in pictures.items():
        title = f"elmkernels on {where}; dashed: {ceiling}"
        drawn += chart.draw_rates(title, tasks, folder / name, unit)
    return drawn


def _op_panel(name: str, u: Found) -> Found:
    """Effective bandwidth of each runner: the least bytes that the op must move, over its time."""
    taken = {"ours": u["time"], **u["baselines"]}
    rates = {who: u["nbytes"] / t["median"] / 1e9 for who, t in taken.items()}
    ceiling = u["nbytes"] / u["copy"]["median"] / 1e9
    return {"task": name, "rates": rates, "ceiling": None if u["of_copy"] > 1 else ceiling}
