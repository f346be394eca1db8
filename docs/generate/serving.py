"""The table of docs/serving.md, from benchmarks/results."""

from .figures import RESULTS, results, speed, table, times

NOT_YET = "Not measured on an idle machine yet."
# What the file calls each way, and how many words that takes in a head.
WAYS = {
    "vllm ours": "vLLM, our ops",
    "vllm native": "vLLM's own ops",
    "vllm ours, eager": "eager, our ops",
    "vllm native, eager": "eager, vLLM's own",
    "elmkernels.generate": "`generate`, one batch",
    "llama.cpp BF16": "llama.cpp, bf16",
}


def throughput(name: str) -> str:
    """Tokens a second at each number of requests, ours as often as vLLM's own behind them."""
    if not (RESULTS / name / "results.json").is_file():
        return NOT_YET
    found = results(name)
    speeds, ratios = found["tokens a second"], found["times vLLM's own ops"]
    ways = [way for way in WAYS if way in speeds]
    loads = sorted({int(load) for way in ways for load in speeds[way]})

    def cell(way: str, load: str) -> str:
        if load not in speeds[way]:
            return "-"
        ratio = ratios.get(way, {}).get(load)
        return speed(speeds[way][load]) + (f" ({times(ratio)})" if ratio is not None else "")

    rows = [[str(load), *(cell(way, str(load)) for way in ways)] for load in loads]
    runs = found["runs"]
    machines = dict.fromkeys(run["machine"]["cpu"] for run in runs)
    busy = " The machine was busy with other work." * any(run["busy"] for run in runs)
    rounds = max(sum(run["way"] == way for run in runs) for way in ways)
    said = (
        f"Medians of up to {rounds} processes of each way on {' and '.join(machines)}, "
        f"{runs[0]['threads']} threads, prompts of {found['prompt']} and "
        f"{found['new']} new tokens, OpenELM-270M's shape in bfloat16.{busy}"
    )
    return f"{table(['requests at once', *map(WAYS.get, ways)], rows)}\n\n{said}"
