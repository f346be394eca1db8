"""The tables of docs/benchmarks.md about decoding alone: class by class beside llama.cpp, and
passes of several tokens; from benchmarks/results.
"""

import json

from .figures import RESULTS, results, speed, table, times

LLAMA, BF16 = "llama.cpp's best", "our bf16"


def decoding(name: str) -> str:
    """Each format of ours beside llama.cpp's best file of the class and our bfloat16, with what it
    is to reach in brackets.
    """
    rows = []
    for record in results(name)["records"]:
        speeds = {n: r["tokens_per_second"] for n, r in record["runners"].items()}
        files = {n: s for n, s in speeds.items() if record["runners"][n]["kind"] == "llama.cpp"}
        best = max(files, key=files.__getitem__)
        for format, bars in record["bars"].items():
            told = [
                f"{times(bars[bar]['reached'])} ({times(bars[bar]['wanted'])})"
                if bar in bars
                else "-"
                for bar in (LLAMA, BF16)
            ]
            reading = bars.get("reading")
            told.append("-" if reading is None else f"{reading['reached']:.0%} (90%)")
            mine = speed(speeds[f"ours {format}"])
            said = f"{best.removeprefix('llama.cpp ')}, {speed(speeds[best])}"
            rows.append([record["model"], str(record["batch"]), format, mine, said, *told])
    head = ["model", "batch", "format", "tokens/s", "llama.cpp's best", "of it", "of our bf16"]
    return table([*head, "of reading"], rows)


def several_tokens(name: str) -> str:
    """What passes of 2 to 8 tokens cost beside one: of each model, after each number of tokens."""
    files = sorted((RESULTS / name).glob("*.json"), key=lambda file: "1_1B" in file.name)
    rows, head = [], ["model", "format", "tokens before", "a pass of 1"]
    for file in files:
        found = json.loads(file.read_text())
        for before, passes in found["seconds"].items():
            one = f"{1e3 * passes['1']['median']:.1f} ms"
            costs = [times(p["of_one"]) for n, p in passes.items() if n != "1"]
            model = found["model"].removeprefix("OpenELM-")
            rows.append([model, found["format"], before.removeprefix("after "), one, *costs])
    return table([*head, *map(str, range(2, 9))], rows)


TABLES = {
    "decoding": lambda: decoding("decode-cpu"),
    "several-tokens": lambda: several_tokens("several-tokens-cpu"),
}
