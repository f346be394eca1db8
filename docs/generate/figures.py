"""The tables of measured figures, from the files in benchmarks/results.

Files keep the names of the day on which they were measured: "swapped" is an accelerated model,
"rivals" are baselines, "packed" is packed12.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
OURS = ("accelerated", "swapped")
BASELINES = ("baselines", "rivals")
PACKED12 = ("packed12", "packed")


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "results.json").read_text())


def either(found: dict[str, Any], names: Sequence[str]) -> Any:
    """The value under the first of the names that a file uses."""
    return next(found[name] for name in names if name in found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}"


def times(x: float) -> str:
    return f"{x:.2f}x"


def of(share: float | None) -> str:
    """A share of a ceiling; one of more than was measured as the most is said to be."""
    return "an unusable share" if share is None or share > 1.05 else f"{share:.0%}"


def mib(x: float) -> str:
    return f"{x / 2**20:.0f}"


def _main_tasks(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for dtype, found in results(name)["dtypes"].items():
        for task in found["speed"]:
            yield dtype, task


def main_job(name: str) -> str:
    rows = []
    for dtype, task in _main_tasks(name):
        per_second = task["tokens_per_second"]
        reached = task["of_ceiling"] and either(task["of_ceiling"], OURS)
        rows.append(
            [
                task["task"],
                dtype,
                speed(per_second["eager"]),
                speed(either(per_second, OURS)),
                times(task["ratio"]["eager"]),
                f"{of(reached)} of the {task['bound']} ceiling",
            ]
        )
    return table(["task", "dtype", "eager", "accelerated", "ratio", "accelerated reaches"], rows)


def training(name: str) -> str:
    rows = []
    for precision, task in results(name)["precisions"].items():
        per_second, reached, peak = task["tokens_per_second"], task["of_ceiling"], task["peak"]
        ours = either(peak, OURS)
        mine, eager = (reached and either(reached, names) for names in (OURS, ("eager",)))
        rows.append(
            [
                precision + (" (autocast)" if precision == "bf16" else ""),
                speed(per_second["eager"]),
                speed(either(per_second, OURS)),
                times(task["ratio"]["eager"]),
                f"{of(mine)} (eager {of(eager)})",
                *(f"{mib(ours[k])} of {mib(peak['eager'][k])} MiB" for k in ("first", "next")),
            ]
        )
    head = ["precision", "eager", "accelerated", "ratio", "of the matrix-product ceiling"]
    return table([*head, "memory: first", "next"], rows)


def _format(name: str) -> str:
    """ "bf16" of the runner "ours bf16"."""
    word = name.removeprefix("ours ")
    return PACKED12[0] if word in PACKED12 else word


def _shares(task: dict[str, Any], name: str) -> str:
    """The share of a plain read of the same weights that a token reaches, by the rounds."""
    runner = task["runners"][name]
    if "step_bytes" not in runner:
        return "-"
    probes = task["read_bandwidth"]["rounds"]
    found = [
        task["steps"] * runner["step_bytes"] / seconds / probe[f"weights of {name}"]
        for seconds, probe in zip(runner["samples"], probes, strict=True)
    ]
    surpassed = " (surpassed)" if max(found) > 1.05 else ""
    return f"{min(found):.0%} to {max(found):.0%}{surpassed}"


def _generation_row(model: str, task: dict[str, Any], name: str) -> list[str]:
    runners = task["runners"]
    rates = {n: r["tokens_per_second"]["median"] for n, r in runners.items()}
    mine = rates[name]

    def beside(kind: str) -> str:
        found = [n for n, r in runners.items() if r["kind"] == kind]
        if not found:
            return "-"
        best = max(found, key=rates.__getitem__)
        kind_of_file = f" {best.split()[-1]}" if kind == "llama.cpp" else ""
        return f"{speed(rates[best])} ({times(mine / rates[best])}){kind_of_file}"

    others = [beside(kind) for kind in ("eager", "compiled", "llama.cpp")]
    return [model, task["task"], _format(name), speed(mine), *others, _shares(task, name)]


def generation(*names: str) -> str:
    rows = []
    for name in names:
        found = results(name)
        for group in found["groups"].values():
            for task in group["tasks"]:
                ours = [n for n, r in task["runners"].items() if r["kind"] == "ours"]
                model = found["model"].removeprefix("OpenELM-")
                rows += [_generation_row(model, task, runner) for runner in ours]
    head = ["model", "task", "format", "ours", "eager", "compiled", "llama.cpp", "of reading"]
    return table(head, rows)


def _ratio(record: dict[str, Any], baseline: str) -> float | None:
    found = either(record, BASELINES).get(baseline)
    return found and found["median"] / record["time"]["median"]


def _faster(record: dict[str, Any], baseline: str) -> str:
    x = _ratio(record, baseline)
    return "-" if x is None else f"{x:.2f}" if x < 1.995 else f"{x:.1f}"


def _pairs(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each record of a forward, and that of the same case with its backward."""
    records = results(name)["records"]
    key = ("op", "case", "dtype", "backend")
    backward = {tuple(r[k] for k in key): r for r in records if r["backward"]}
    for record in records:
        if not record["backward"]:
            yield record, backward.get(tuple(record[k] for k in key))


def _cells(pair: Sequence[dict[str, Any] | None], baselines: Sequence[str]) -> list[str]:
    return [" / ".join(_faster(r, b) for b in baselines) if r else "-" for r in pair]


def ops(name: str, leave: Sequence[str] = ("attention",), rows: Sequence[int] = (512, 4096)) -> str:
    found = []
    for pair in _pairs(name):
        op, dtype, n = pair[0]["op"], pair[0]["dtype"], int(pair[0]["case"].rpartition("_")[2])
        if op not in leave and n in rows:
            cells = _cells(pair, ("reference", "eager", "compiled"))
            found.append((op, dtype, n, cells))
    order = list(dict.fromkeys(f[0] for f in found))
    found.sort(key=lambda f: (order.index(f[0]), f[1], f[2]))
    names = "naive / fair / compiled"
    return table(
        ["op", "dtype", "rows", f"forward: {names}", f"forward + backward: {names}"],
        [[op, dtype, str(n), *cells] for op, dtype, n, cells in found],
    )


_ATTENTION_CASES = {
    "1_1B_rows_512": "a prompt of 512",
    "1_1B_rows_1": "one token after 512 others",
    "1_1B_varlen_512": "varlen documents",
    "1_1B_packed_512": "varlen documents",
}


def attention(name: str) -> str:
    """Beside torch's own attention: document by document where the row holds several."""
    found = []
    for pair in _pairs(name):
        case = _ATTENTION_CASES[pair[0]["case"]]
        best = "documents" if "documents" in either(pair[0], BASELINES) else "eager"
        found.append([case, pair[0]["dtype"], *_cells(pair, (best,))])
    order = list(dict.fromkeys(_ATTENTION_CASES.values()))
    found.sort(key=lambda f: (order.index(f[0]), f[1]))
    return table(["task", "dtype", "forward", "forward + backward"], found)


def loss(name: str) -> str:
    rows = [
        [r["dtype"], times(_ratio(r, "eager")), times(_ratio(r, "torch"))]
        for r in results(name)["records"]
    ]
    return table(["dtype", "logits and F.cross_entropy", "torch's F.linear_cross_entropy"], rows)


_TRANSFORMERS = {
    "generate": ("64 tokens after 64", "kernels=None", "elmkernels"),
    "prefill": ("a prompt of 512", "kernels=None", "elmkernels"),
    "trainer": ("step of the Trainer", "kernels=None", None),
    "lora": ("LoRA step of the Trainer", "kernels=None", None),
}


def transformers(name: str) -> str:
    """The class of transformers beside itself without kernels, and this package's functions."""
    rows, found = [], results(name)
    for task, (words, plain, own) in _TRANSFORMERS.items():
        if task not in found:
            continue
        seconds = {n: t["median"] for n, t in found[task]["seconds"].items()}
        peaks = found[task].get("peak bytes")
        less = "-" if peaks is None else f"{mib(peaks['native'])} of {mib(peaks[plain])} MiB"
        rows.append([
            words, f"{seconds['native']:.2f} s", f"{seconds[plain]:.2f} s",
            times(seconds[plain] / seconds["native"]),
            "-" if own is None else times(seconds[own] / seconds["native"]), less,
        ])  # fmt: skip
    head = ["task", "with kernels", "kernels=None", "as fast", "as this package's own", "memory"]
    return table(head, rows)


def first_of(*names: str) -> str:
    """The first of the runs that is there."""
    return next(n for n in names if (RESULTS / n / "results.json").is_file())


def paper_chart(folder: str, *names: str) -> str:
    """folder: where results are, seen from the document."""
    name = first_of(*names)
    model = results(name)["model"].replace("_", ".")
    return f"![The paper's comparison, {model}]({folder}/{name}/chart.png)"


def paper(*names: str) -> str:
    """The first of the runs that is there."""
    found = results(first_of(*names))
    measured = found["runners"]
    naive = measured["naive"]["tokens_per_second"]
    rows = []
    for name, runner in measured.items():
        own = runner["agree"] is not None
        rates = runner["tokens_per_second"]
        cells = [f"{speed(rates[part])} ({times(rates[part] / naive[part])})" for part in naive]
        model = f"{found['model'].replace('_', '.')}, {name}" if own else name
        rows.append([model, *cells, mib(runner["weight_bytes"])])
    sizes = found["sizes"]
    head = [f"prompt of {sizes['prompt']}", f"{sizes['steps']} tokens after it", "both"]
    return table(["model", *head, "weights, MiB"], rows)


def paper_in_short(name: str) -> str:
    """Both parts together and the chart, if there is such a run: without one, how to make it."""
    if not (RESULTS / name / "results.json").is_file():
        return f"No run is committed yet: `elmkernels bench paper --out benchmarks/results/{name}`."
    found = results(name)
    rates = {n: r["tokens_per_second"]["total"] for n, r in found["runners"].items()}
    model = found["model"].replace("_", ".")
    rows = [
        [
            f"{model}, {n}" if found["runners"][n]["agree"] else n,
            speed(r),
            times(r / rates["naive"]),
        ]
        for n, r in rates.items()
    ]
    sizes = found["sizes"]
    head = f"tokens/s of a prompt of {sizes['prompt']} and {sizes['steps']} tokens after it"
    lines = [table(["model", head, "of naive"], rows), "", paper_chart("benchmarks/results", name)]
    return "\n".join(lines)


def speculation(name: str) -> str:
    rows = []
    for task, found in results(name)["tasks"].items():
        plain = found["plain"]["tokens_per_second"]
        for draft, f in found.items():
            if draft != "plain":
                kept = "-" if f["acceptance"] is None else f"{f['acceptance']:.0%}"
                low, high = (times(f[f"times_plain_{part}"]) for part in ("p20", "p80"))
                mine = (
                    f"{speed(f['tokens_per_second'])} ({times(f['times_plain'])}, {low} to {high})"
                )
                equal = "yes" if f["tokens_equal"] else "no"
                passes = f"{f['tokens_per_pass']:.2f}"
                rows.append([task, draft, speed(plain), mine, kept, passes, equal])
    head = ["text", "draft", "plain", "with it", "guesses kept", "tokens a pass", "tokens equal"]
    return table(head, rows)


PAPER = "paper-1_1b-cpu", "paper-270m-cpu"
TABLES: dict[str, Callable[[], str]] = {
    "paper": lambda: paper(*PAPER),
    "paper-chart": lambda: paper_chart("../benchmarks/results", *PAPER),
    "generation": lambda: generation("generate-270m-cpu", "generate-1_1b-cpu"),
    "training": lambda: training("training-270m-cpu"),
    "loss": lambda: loss("loss-cpu"),
    "main-job": lambda: main_job("openelm-270m-cpu"),
    "attention": lambda: attention("attention-cpu"),
    "ops": lambda: ops("ops-cpu"),
    "speculation": lambda: speculation("speculation-cpu"),
}


def _linked(name: str) -> str:
    return f"[data](benchmarks/results/{name}/results.json)"


def _main_row(task: str, words: str, dtype: str = "bfloat16") -> list[str]:
    name = "openelm-270m-cpu"
    found = next(t for d, t in _main_tasks(name) if d == dtype and t["task"] == task)
    rates = found["tokens_per_second"]
    theirs, mine = rates["eager"], either(rates, OURS)
    return [f"270M, {words}", "eager", speed(theirs), speed(mine), times(mine / theirs)] + [
        _linked(name)
    ]


def _llama_row(name: str, group: str, task: str, ours: Sequence[str], words: str) -> list[str]:
    """Beside the fastest of llama.cpp's file types."""
    found = results(name)
    tasks = found["groups"][group]["tasks"]
    runners = next(t for t in tasks if t["task"] == task)["runners"]
    rates = {n: r["tokens_per_second"]["median"] for n, r in runners.items()}
    mine = either(rates, [f"ours {word}" for word in ours])
    best = max((n for n in rates if runners[n]["kind"] == "llama.cpp"), key=rates.__getitem__)
    model = found["model"].removeprefix("OpenELM-")
    return [
        f"{model}, {words}",
        best,
        speed(rates[best]),
        speed(mine),
        times(mine / rates[best]),
    ] + [_linked(name)]


def six_results() -> str:
    small, large = "generate-270m-cpu", "generate-1_1b-cpu"
    decode, longer = "decode 64 after 128", "decode 32 after 128"
    rows = [
        _main_row("prefill 512", "prompt of 512, bfloat16"),
        _main_row("generate 64 after 128", "64 tokens after 128, bfloat16"),
        _main_row("training step 512", "training step of 512, bfloat16"),
        _llama_row(small, "16-bit", decode, PACKED12, "64 tokens after 128, packed12"),
        _llama_row(small, "int4", decode, ("int4",), "64 tokens after 128, int4"),
        _llama_row(large, "16-bit", longer, ("bf16",), "32 tokens after 128, bfloat16"),
    ]
    return table(["OpenELM", "baseline", "its tokens/s", "ours", "ratio", "file"], rows)
