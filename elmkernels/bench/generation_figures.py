"""What the runners' seconds come to: speeds, shares of the memory's, ratios, and the table."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .benchmark import LLAMA, OURS
from .ceilings import surpassed
from .runners import Runner, Task
from .table import format_table, share
from .timing import summary

BEST = "llama.cpp's best"
READ, OWN = "of_read_bandwidth", "of_reading_its_weights"  # shares of a ceiling


def own_read(name: str) -> str:
    """What a probe is called that reads the weights of a runner."""
    return f"weights of {name}"


def figures(
    task: Task,
    runners: Sequence[Runner],
    seconds: dict[str, list[float]],
    probes: list[dict[str, float]],
    rounds: int,
    peaks: dict[str, int | None],
) -> dict[str, Any]:
    """What a task's seconds of each runner, and the bytes a second of each probe, come to."""
    ceilings = [max(v for n, v in read.items() if not n.startswith("weights")) for read in probes]
    batch, length = task.prompts.shape
    by_name = {r.name: r for r in runners if r.name in seconds}
    found: dict[str, Any] = {}
    for name, runner in by_name.items():
        samples = seconds[name]
        t = summary(samples)
        found[name] = {
            "kind": runner.kind,
            "seconds": asdict(t),
            "samples": samples,
            "tokens_per_second": {
                "median": task.tokens / t.median,
                "p20": task.tokens / t.p80,
                "p80": task.tokens / t.p20,
            },
            "ms_per_token": t.median / task.tokens * 1e3,
            "peak_bytes": peaks.get(name),
        }
        if task.steps and runner.weight_bytes:
            past = batch * (length + task.steps / 2)
            nbytes = runner.weight_bytes + runner.cache_token_bytes * past
            speeds = [task.steps * nbytes / s for s in samples]
            shares = [speed / top for speed, top in zip(speeds, ceilings, strict=True)]
            found[name] |= {
                "step_bytes": nbytes,
                "bytes_per_second": statistics.median(speeds),
                READ: statistics.median(shares),
            }
            if own_read(name) in probes[0]:
                own = [read[own_read(name)] for read in probes]
                shares = [speed / top for speed, top in zip(speeds, own, strict=True)]
                found[name][OWN] = statistics.median(shares)
    return {
        "task": task.name,
        "tokens": task.tokens,
        "batch": batch,
        "steps": task.steps,
        "rounds": len(probes),
        "wanted_rounds": rounds,
        "read_bandwidth": {
            "median": statistics.median(ceilings),
            "rounds": probes,
            "missing": _drop_wrong_shares(found),
        },
        "runners": found,
        "ratios": _ratios(found),
    }


def _drop_wrong_shares(found: dict[str, Any]) -> list[str]:
    """Why ceilings of reading aren't usable, as more was reached; the shares of them become None.
    The memory's ceiling is one for all runners, that of reading its own weights each one's own.
    """
    reasons = []
    shares = {name: f[READ] for name, f in found.items() if READ in f}
    if reason := surpassed(shares, "the ceiling of reading is"):
        reasons.append(reason)
        for name in shares:
            found[name][READ] = None
    what = "the speed of reading its weights is"
    for name, f in found.items():
        if OWN in f and (reason := surpassed({name: f[OWN]}, what)):
            reasons.append(reason)
            f[OWN] = None
    return reasons


def _ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{a format of ours: {baseline: how many times faster ours is}}; below 1 it is slower."""
    taken = {name: f["seconds"]["median"] for name, f in found.items()}
    theirs = [t for name, t in taken.items() if found[name]["kind"] == LLAMA]
    ratios = {}
    for name, mine in taken.items():
        if found[name]["kind"] != OURS:
            continue
        ratios[name] = {n: t / mine for n, t in taken.items() if found[n]["kind"] != OURS}
        if theirs:
            ratios[name][BEST] = min(theirs) / mine
    return ratios


def text(name: str, found: dict[str, Any]) -> str:
    """A group as a table, then what is missing and what ours loses."""
    ours = [n for n, r in found["runners"].items() if r["kind"] == OURS]
    rows = [row for task in found["tasks"] for row in _rows(task, found["runners"], ours)]
    lines = [f"\n{name}"] + ([format_table(rows)] if rows else [])
    for task in found["tasks"]:
        top = task["read_bandwidth"]["median"] / 1e9
        lines.append(f"{task['task']}: reads {top:.1f} GB/s, {task['rounds']} rounds")
        lines += task["read_bandwidth"]["missing"]
        for mine, ratios in task["ratios"].items():
            lost = [f"{n} ({r:.2f}x)" for n, r in ratios.items() if r < 1 and n != BEST]
            if lost:
                lines.append(f"{mine} is slower than {', '.join(lost)}")
    for runner, about in found["runners"].items():
        if loss := about.get("facts", {}).get("rounding"):
            lines.append(
                f"{runner}: logits differ by {loss['logits_rms']:.2%} of their rms (at most "
                f"{loss['logits_max']:.1%}), perplexity of its own text {loss['perplexity']:.4g}, "
                f"without rounding {loss['perplexity_without']:.4g}"
            )
    lines += [f"missing {who}: {why}" for who, why in found["missing"].items()]
    return "\n".join(lines)


def _rows(task: dict[str, Any], runners: dict[str, Any], ours: list[str]) -> list[dict[str, Any]]:
    rows = []
    for i, (name, f) in enumerate(task["runners"].items()):
        rate, agree = f["tokens_per_second"], runners[name]["agree"]
        peak_bytes = f["peak_bytes"]
        row = {
            "task": "" if i else task["task"],
            "runner": name,
            "tokens/s": rate["median"],
            "p20": rate["p20"],
            "p80": rate["p80"],
            "ms/token": f["ms_per_token"],
            "MB/step": f["step_bytes"] / 1e6 if "step_bytes" in f else None,
            "GB/s": f["bytes_per_second"] / 1e9 if "step_bytes" in f else None,
            "of reading": share(f[READ]) if READ in f else None,
            "of its weights": share(f[OWN]) if OWN in f else None,
            "peak MiB": None if peak_bytes is None else round(peak_bytes / 2**20),
        }
        said = runners[name]["facts"].get("speculation", {}).get(task["task"])
        if any("speculation" in about["facts"] for about in runners.values()):
            kept = said and said["acceptance"]
            row["guesses kept"] = None if kept is None else f"{kept:.0%} of {said['guessed']}"
        for mine in ours:
            ratio = task["ratios"].get(mine, {}).get(name)
            row[f"{mine} is"] = None if ratio is None else f"{ratio:.2f}x"
        if task["steps"] and task["batch"] == 1 and agree:
            row["agrees"] = f"{agree['equal']}/{agree['of']}"
        rows.append(row)
    return rows
