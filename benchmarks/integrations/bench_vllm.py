"""Tokens a second of many requests at once: vLLM with this package's ops, with its own, and others.

    python -m pytest benchmarks/integrations/bench_vllm.py               # does it run?
    python benchmarks/integrations/bench_vllm.py --out FOLDER            # figures: an idle machine

Each way runs in processes of its own that take turns (a b, then b a), as an engine can't be started
twice in one. A process takes every load once it has answered one request; counted are the new
tokens from the first request's arrival to the last one's end, the prompts' time among it. vLLM's
scheduler runs in the same process as the model, so that its waiting takes no core from the ops. The
weights are random, OpenELM-270M's shape in bfloat16. What a process found is written into
FOLDER/results.json as it ends, so that rounds can be run one by one; medians are over all of them.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

OFF = [f"-elmkernels_{name}" for name in ("rms_norm", "qk_norm_rope", "swiglu", "linear")]
# vLLM's compilation options of each of its ways; eager is what a server with adapters runs.
VLLM: dict[str, dict[str, Any]] = {
    "vllm ours": {},
    "vllm native": {"custom_ops": ["none"]},
    "vllm ours, eager": {"mode": 0},
    "vllm native, eager": {"mode": 0, "custom_ops": ["all", *OFF]},
}
GENERATE, LLAMA = "elmkernels.generate", "llama.cpp BF16"
WAYS = (*VLLM, GENERATE, LLAMA)
PAIRS = (("vllm native", "vllm ours"), ("vllm native, eager", "vllm ours, eager"))
LOADS, PROMPT, NEW = (1, 4, 16, 64), 128, 128


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    drawn = random.Random(count)
    return [[drawn.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def by_vllm(folder: str, way: str, length: int, threads: int) -> Any:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512,
        kv_cache_memory_bytes=2 << 30, compilation_config=VLLM[way], disable_log_stats=True,
        enable_prefix_caching=False, distributed_executor_backend="uni",
    )  # fmt: skip

    def run(rows: list[list[int]], new: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": row} for row in rows]
        found = llm.generate(given, sampling, use_tqdm=False)
        if [len(row.outputs[0].token_ids) for row in found] != [new] * len(rows):
            raise RuntimeError(f"{way} gave other counts of tokens than were asked for")

    return run


def by_generate(folder: str, way: str, length: int, threads: int) -> Any:
    import torch

    import elmkernels

    torch.set_num_threads(threads)
    model = elmkernels.OpenELM.from_pretrained(folder)
    elmkernels.accelerate(model)
    return lambda rows, new: elmkernels.generate(model, rows, new)


def by_llama(folder: str, way: str, length: int, threads: int) -> Any:
    import torch

    from elmkernels import OpenELM
    from elmkernels.bench.baselines import llama_cpp
    from elmkernels.openelm.gguf import export_gguf

    if missing := llama_cpp.missing():
        raise ImportError(missing)
    torch.set_num_threads(threads)
    model, file = OpenELM.from_pretrained(folder), Path(folder) / "model.gguf"
    if not file.exists():
        export_gguf(model, file, "bf16")
    loaded = llama_cpp.Model(file, model.config, extra_buffers=False)

    def run(rows: list[list[int]], new: int) -> None:
        context = llama_cpp.Context(loaded, len(rows[0]) + new, len(rows), "flash attention")
        last = context.prompt(rows)
        for _ in range(new - 1):
            last = context.step(last)
        context.close()

    return run


def child(args: argparse.Namespace) -> None:
    """One way in this process: a line of JSON after each load, with all that is known by then."""
    from elmkernels.openelm.checkpoint import read_config

    made = by_generate if args.child == GENERATE else by_llama if args.child == LLAMA else by_vllm
    start = time.perf_counter()
    run = made(args.model, args.child, args.prompt + args.new, args.threads)
    found: dict[str, Any] = {"start seconds": round(time.perf_counter() - start, 1)}
    vocabulary = read_config(args.model).vocab_size
    run(prompts(2, args.prompt, vocabulary), 2)
    for load in args.loads:
        rows = prompts(load, args.prompt, vocabulary)
        start = time.perf_counter()
        run(rows, args.new)
        found[str(load)] = round(load * args.new / (time.perf_counter() - start), 2)
        print("FOUND " + json.dumps(found), flush=True)


def measure(way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a process of one way found, or why it found nothing."""
    import elmkernels

    here = str(Path(elmkernels.__file__).parents[1])  # the package that this process has
    command = [
        sys.executable, __file__, "--child", way, "--model", str(folder),
        "--prompt", str(args.prompt), "--new", str(args.new), "--threads", str(args.threads),
        "--loads", *map(str, args.loads),
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": here, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=args.limit
        )
        out, why = done.stdout, (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    except subprocess.TimeoutExpired as late:
        out, why = (late.stdout or b"").decode(), f"no end in {args.limit:g} seconds"
    said = [line.removeprefix("FOUND ") for line in out.splitlines() if line.startswith("FOUND ")]
    found = json.loads(said[-1]) if said else {}
    lacks = [load for load in args.loads if str(load) not in found]
    return found | ({"missing": {"loads": lacks, "why": why[-200:]}} if lacks else {})


def summary(runs: list[dict[str, Any]], loads: list[int]) -> dict[str, Any]:
    """Medians of each way, and how many times as fast our ops are as vLLM's own."""
    median: dict[str, dict[str, float]] = {}
    for way in WAYS:
        for load in map(str, loads):
            found = [run[load] for run in runs if run["way"] == way and load in run]
            if found:
                median.setdefault(way, {})[load] = round(statistics.median(found), 2)
    times = {
        ours: {
            n: round(median[ours][n] / median[own][n], 3) for n in median[ours] if n in median[own]
        }
        for own, ours in PAIRS
        if ours in median and own in median
    }
    return {"tokens a second": median, "times vLLM's own ops": times}


def carry_out(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A round more in args.out/results.json."""
    from elmkernels.bench.machine import busy
    from elmkernels.bench.timing import fingerprint

    file, results = args.out / "results.json", {}
    args.out.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text())["runs"] if file.exists() else []
    again = sum(run["way"] == args.ways[0] for run in before) % 2
    order = args.ways[::-1] if again else args.ways
    for way in order:
        held, about = busy(), fingerprint("cpu")
        found = measure(way, folder, args)
        before.append(
            {"way": way, "machine": about, "busy": held, "threads": args.threads, **found}
        )
        results = {"prompt": args.prompt, "new": args.new, **summary(before, args.loads)}
        file.write_text(json.dumps(results | {"runs": before}, indent=1) + "\n")
    return results | {"runs": before}


def save(folder: Path, full: bool) -> None:
    import torch

    from elmkernels import OpenELM, OpenELMConfig

    small = OpenELMConfig(
        num_transformer_layers=2, model_dim=128, head_dim=64, num_gqa_groups=2, vocab_size=512,
        ffn_dim_divisor=64, qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0),
        normalize_qk_projections=True, share_input_output_layers=True,
    )  # fmt: skip
    config = OpenELMConfig.from_name("OpenELM-270M") if full else small
    OpenELM(config, seed=0, dtype=torch.bfloat16).save_pretrained(folder)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for results.json")
    parser.add_argument("--rounds", type=int, default=2, help="how many more rounds")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--loads", nargs="+", type=int, default=list(LOADS))
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="tokens after it")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=600, help="seconds of a process")
    parser.add_argument("--model", help="a folder that is there already")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return parser


@pytest.mark.parametrize("way", [GENERATE, LLAMA, "vllm ours, eager"])
def test_many_requests(benchmark, tmp_path, way):
    if way != GENERATE:
        pytest.importorskip("vllm" if way in VLLM else "llama_cpp")
    save(tmp_path / "model", full=False)
    words = ["--out", str(tmp_path / "out"), "--loads", "1", "3", "--prompt", "5", "--new", "4"]
    args = arguments().parse_args([*words, "--threads", "1", "--ways", way])
    found = benchmark.pedantic(carry_out, (args, tmp_path / "model"), rounds=1, iterations=1)
    assert {"start seconds", "1", "3"} <= found["runs"][0].keys(), found
    assert found["tokens a second"][way].keys() == {"1", "3"}


def main() -> None:
    args = arguments().parse_args()
    if args.child:
        child(args)
        return
    if args.out is None:
        raise SystemExit("--out FOLDER is needed")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.model or made)
        if not args.model:
            save(folder, full=True)
        for _ in range(args.rounds):
            found = carry_out(args, folder)
            print(json.dumps({k: v for k, v in found.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
