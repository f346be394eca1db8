"""Speculative decoding on real text: train a target and a draft on the sources of Python's library
(speculation_models.py), then write held-out text with every kind of draft beside plain decoding.

    python benchmarks/openelm/bench_speculation.py --folder runs/speculation --minutes 4
    python benchmarks/openelm/bench_speculation.py --folder runs/speculation --out results.json
    python benchmarks/openelm/bench_speculation.py --quick

Training goes on where it was: give the first line until both models are there, or leave out
--minutes and let it take a quarter of an hour of two cores. It needs
`pip install 'elmkernels[text,train]'`.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speculation_models import (
    MODELS,
    QUICK,
    STEPS,
    VOCABULARY,
    edits,
    prepare,
    sources,
    train,
)

from elmkernels import OpenELM, accelerate
from elmkernels.bench.timing import fingerprint
from elmkernels.generation.drafts import self_draft
from elmkernels.openelm import Session, Tokenizer

PROMPT, NEW = 128, 96  # tokens before and after, of held-out code

COUNTED = ("guessed", "accepted", "passes", "tokens")
Case = tuple[list[int], int]  # a prompt, and how many tokens are to follow


def tasks(tokenizer: Tokenizer, quick: bool) -> dict[str, list[Case]]:
    """Held-out code that goes on, held-out functions that are shown to be edited, random tokens."""
    prompt, new, most = (16, 12, 2) if quick else (PROMPT, NEW, 8)
    texts = [text for text in sources(held_out=True) if len(text) > 10 * prompt]
    draw = random.Random(5)
    code = []
    for text in draw.sample(texts, most):
        ids = tokenizer.encode(text)
        start = draw.randrange(max(1, len(ids) - prompt))
        code.append((ids[start : start + prompt], new))
    changed = []
    for before, after in edits(texts, 6, 1)[: 2 * most]:
        shown, wanted = tokenizer.encode(before), tokenizer.encode(after)
        if len(changed) < most and len(wanted) >= 16:
            changed.append((shown, min(new, len(wanted))))
    size = tokenizer.vocab_size
    noise = [([draw.randrange(size) for _ in range(prompt)], new) for _ in range(most)]
    return {"held-out code": code, "edited functions": changed, "random tokens": noise}


def measure(
    model: OpenELM, drafts: dict[str, Any], cases: list[Case], rounds: int
) -> dict[str, Any]:
    """Plain decoding and every draft in turns: seconds a token after the first one, acceptance, and
    whether the tokens are those of plain decoding.
    """
    sessions = {"plain": Session(model)}
    sessions |= {name: Session(model, draft=draft) for name, draft in drafts.items()}
    names = list(sessions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counts = {name: dict.fromkeys(COUNTED, 0) for name in drafts}
    said: dict[str, list[list[int]]] = {}
    for n in range(rounds + 1):  # the first warms up
        spent = dict.fromkeys(names, 0.0)
        said = {name: [] for name in names}
        for i, (prompt, new) in enumerate(cases):
            first = (n + i) % len(names)
            for name in (*names[first:], *names[:first]):
                session = sessions[name]
                session.cache.reset()  # the prompt is read again by the model, and by its draft
                stream = session.stream([prompt], new, stop_tokens=())
                next(stream)
                start = time.perf_counter()
                for _ in stream:
                    pass
                spent[name] += time.perf_counter() - start
                said[name].append(stream.rows[0].tokens)
                if stream.speculation is not None and n:
                    about = stream.speculation.results()
                    counts[name] = {field: counts[name][field] + about[field] for field in COUNTED}
        if n:
            for name in names:
                seconds[name].append(spent[name])
    made = sum(new - 1 for _, new in cases)
    found: dict[str, Any] = {
        "plain": {"tokens_per_second": made / median(seconds["plain"]), "samples": seconds["plain"]}
    }
    for name in drafts:
        pairs = zip(seconds["plain"], seconds[name], strict=True)
        c = counts[name]
        found[name] = {
            "tokens_per_second": made / median(seconds[name]),
            **_times([a / b for a, b in pairs]),
            "samples": seconds[name],
            "guessed": c["guessed"],
            "acceptance": c["accepted"] / c["guessed"] if c["guessed"] else None,
            "tokens_per_pass": c["tokens"] / c["passes"],
            "tokens_equal": said[name] == said["plain"],
        }
    return found


def compare(folder: Path, rounds: int, quick: bool) -> dict[str, Any]:
    """Every draft on every task, and on random weights."""
    tokenizer = Tokenizer(folder / "tokenizer.json", None)
    target, draft = (
        OpenELM.from_pretrained(folder / name / "final", dtype=torch.bfloat16).eval()
        for name in MODELS
    )
    noise = OpenELM(target.config, seed=0, dtype=torch.bfloat16).eval()
    for model in (target, draft, noise):
        accelerate(model)
    results: dict[str, Any] = {
        "machine": fingerprint(torch.device("cpu")),
        "parameters": {
            "target": target.config.num_parameters,
            "draft": draft.config.num_parameters,
        },
        "dtype": "bfloat16",
        "bytes": {"target": _bytes(target), "self": _bytes(self_draft(target))},
        "tasks": {},
    }
    found = tasks(tokenizer, quick)
    drafts = {"lookup": "lookup", "self": "self", "draft": draft}
    for name, cases in found.items():
        results["tasks"][name] = measure(target, drafts, cases, rounds)
        print(table(name, results["tasks"][name]), flush=True)
    name = "random tokens, random weights"
    results["tasks"][name] = measure(noise, drafts, found["random tokens"], rounds)
    print(table(name, results["tasks"][name]))
    return results


def _times(ratios: list[float]) -> dict[str, float]:
    """How many times as fast as plain decoding: the rounds' median, and where 60% of them lie."""
    low, high = (float(torch.tensor(ratios, dtype=torch.float64).quantile(q)) for q in (0.2, 0.8))
    return {"times_plain": median(ratios), "times_plain_p20": low, "times_plain_p80": high}


def _bytes(model: OpenELM) -> int:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())


def table(name: str, found: dict[str, Any]) -> str:
    """A task's figures as lines."""
    lines = [f"{name}: plain {found['plain']['tokens_per_second']:.0f} tokens/s"]
    for draft, f in found.items():
        if draft != "plain":
            kept = "no guesses" if f["acceptance"] is None else f"{f['acceptance']:.0%} kept"
            lines.append(
                f"  {draft:<7} {f['tokens_per_second']:.0f} tokens/s, {f['times_plain']:.2f}x "
                f"({f['times_plain_p20']:.2f} to {f['times_plain_p80']:.2f}), "
                f"{kept}, {f['tokens_per_pass']:.2f} tokens a pass, equal: {f['tokens_equal']}"
            )
    return "\n".join(lines)


def test_speculation(benchmark, tmp_path):
    """The whole way, with models that have learned nothing."""
    prepare(tmp_path, 512, 200_000)
    assert train(tmp_path, 60, dict.fromkeys(STEPS, 2), **QUICK)
    results = benchmark.pedantic(lambda: compare(tmp_path, 1, True), rounds=1)
    assert all(f.get("tokens_equal", True) for t in results["tasks"].values() for f in t.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="of texts and models")
    parser.add_argument("--minutes", type=float, default=60, help="of training, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file of results")
    parser.add_argument("--quick", action="store_true", help="models that have learned nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "tokenizer.json").exists():
            prepare(folder, 512 if args.quick else VOCABULARY, 200_000 if args.quick else None)
        shape = QUICK if args.quick else {}
        steps = dict.fromkeys(STEPS, 2) if args.quick else STEPS
        if not train(folder, args.minutes, steps, **shape):
            print("not trained to the end: the same command goes on")
            return
        results = compare(folder, 1 if args.quick else args.rounds, args.quick)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
