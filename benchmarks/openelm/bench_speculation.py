"""Speculative decoding on real text: train a target and a draft on the sources of Python's library,
then write held-out code with every kind of draft beside plain decoding.

    python benchmarks/openelm/bench_speculation.py --folder runs/speculation --minutes 4
    python benchmarks/openelm/bench_speculation.py --folder runs/speculation --out results.json
    python benchmarks/openelm/bench_speculation.py --quick

Training goes on where it was: give the first line until both models are there. Half of the text
are files as they are, half are functions that are shown twice, the second time with one of their
names changed. It needs `pip install 'elmkernels[text,train]'`.
"""

import argparse
import ast
import json
import random
import re
import signal
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from elmkernels import OpenELM, accelerate
from elmkernels.bench.timing import fingerprint
from elmkernels.cli.main import main as elmkernels
from elmkernels.generation.drafts import self_draft
from elmkernels.openelm import Session, Tokenizer

VOCABULARY = 2048
END = "<eos>"
# Held out: training sees none of their files.
HELD_OUT = ("email", "http", "json")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SHAPE = {
    "head_dim": 64, "num_gqa_groups": 4, "ffn_dim_divisor": 64, "vocab_size": VOCABULARY,
    "normalize_qk_projections": True, "share_input_output_layers": True,
    "rope_max_length": 2048, "max_context_length": 1024,
}  # fmt: skip
MODELS = {
    "target": SHAPE
    | {"num_transformer_layers": 6, "model_dim": 512}
    | {"qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0]},
    "draft": SHAPE
    | {"num_transformer_layers": 3, "model_dim": 192}
    | {"qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 3.0]},
}
STEPS = {"target": 420, "draft": 600}
QUICK: dict[str, Any] = {
    "num_transformer_layers": 2,
    "model_dim": 64,
    "ffn_multipliers": [1.0, 1.0],
}
QUICK["vocab_size"] = 512
PROMPT, NEW = 128, 96  # tokens before and after, of held-out code


def sources(held_out: bool) -> Iterator[str]:
    """The texts of Python's library, of the held-out folders or of all others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not LEFT_OUT & set(parts) and (parts[0] in HELD_OUT) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")


def functions(text: str) -> list[str]:
    """The functions of a source, of a length that an edit of one fits a sequence twice."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines()
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = lines[node.lineno - 1 : node.end_lineno]
            indent = len(first[0]) - len(first[0].lstrip())
            body = "\n".join(line[indent:] for line in first) + "\n"
            if 160 <= len(body) <= 900:
                found.append(body)
    return found


def edit(function: str, names: list[str], draw: random.Random) -> tuple[str, str] | None:
    """(a function and how one of its names is to change, the function after that)."""
    tree = ast.parse(function)
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {node.id for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)
            and isinstance(node, ast.Name)}  # fmt: skip
    own = sorted(own - {"self", "cls"})
    if not own:
        return None
    old, new = draw.choice(own), draw.choice(names)
    if re.search(rf"\b{new}\b", function):
        return None
    return f"{function}\n# {old} -> {new}\n", re.sub(rf"\b{old}\b", new, function)


def edits(texts: list[str], seed: int) -> list[tuple[str, str]]:
    """An edit of each function that has a name to change."""
    draw = random.Random(seed)
    found = [function for text in texts for function in functions(text)]
    names = sorted({name for f in found for name in re.findall(r"\b[a-z][a-z_]{2,11}\b", f)})
    made = []
    for function in found:
        try:
            pair = edit(function, names, draw)
        except SyntaxError:
            continue
        made += [] if pair is None else [pair]
    draw.shuffle(made)
    return made


def prepare(folder: Path, vocabulary: int, most: int | None = None) -> None:
    """Write the texts of training and a tokenizer of them. most: characters of each kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    texts = list(sources(held_out=False))
    random.Random(0).shuffle(texts)
    if most is not None:
        while sum(map(len, texts)) > most:
            texts.pop()
    pairs = [before + after for before, after in edits(texts, seed=1)]
    # As many characters of files as of edits, so that half of what is seen is either.
    room = sum(map(len, pairs))
    while sum(map(len, texts)) > room and len(texts) > 1:
        texts.pop()
    documents = texts + pairs
    random.Random(2).shuffle(documents)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    with (folder / "validation.jsonl").open("w", encoding="utf-8") as file:
        held = list(sources(held_out=True))
        file.writelines(json.dumps({"text": text}) + "\n" for text in held)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def recipe(folder: Path, name: str, steps: int, length: int = 512, **shape: Any) -> dict[str, Any]:
    """How a model is trained, as `elmkernels train` reads it."""
    often = max(1, steps // 4)
    return {
        "model": MODELS[name] | shape,
        "data": {
            "train": [str(folder / "train.jsonl")],
            "validation": [str(folder / "validation.jsonl")],
            "tokenizer": str(folder / "tokenizer.json"),
            "sequence_length": length,
        },
        "batch": {"sequences": 4, "micro": 4},
        "schedule": {
            "steps": steps, "warmup_steps": max(1, steps // 12), "max_lr": 2e-3, "min_lr": 1e-4,
        },
        "keep": {
            "checkpoint_every": often, "checkpoints": 1, "average": 0,
            "evaluate_every": often, "evaluate_sequences": 8,
        },
    }  # fmt: skip


def train(folder: Path, minutes: float, steps: dict[str, int], **shape: Any) -> bool:
    """Train what isn't trained yet, for so long at most; whether both models are there."""
    end = time.monotonic() + 60 * minutes
    for name, count in steps.items():
        done = folder / name / "done"
        if done.exists():
            continue
        path = folder / f"{name}.yaml"
        length = 64 if shape else 512
        path.write_text(yaml.safe_dump(recipe(folder, name, count, length, **shape)))
        # Ctrl-C ends a run with a checkpoint, from which the next goes on.
        timer = threading.Timer(end - time.monotonic(), signal.raise_signal, [signal.SIGINT])
        timer.daemon = True
        timer.start()
        code = elmkernels(["train", str(path), "--device", "cpu", "--out", str(folder / name)])
        timer.cancel()
        if code:
            return False
        done.touch()
    return True


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
    for before, after in edits(texts, seed=6)[:most]:
        changed.append((tokenizer.encode(before)[-200:], min(new, len(tokenizer.encode(after)))))
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
            "times_plain": median(a / b for a, b in pairs),
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


def _bytes(model: OpenELM) -> int:
    return sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())


def table(name: str, found: dict[str, Any]) -> str:
    """A task's figures as lines."""
    lines = [f"{name}: plain {found['plain']['tokens_per_second']:.0f} tokens/s"]
    for draft, f in found.items():
        if draft != "plain":
            kept = "no guesses" if f["acceptance"] is None else f"{f['acceptance']:.0%} kept"
            lines.append(
                f"  {draft:<7} {f['tokens_per_second']:.0f} tokens/s, {f['times_plain']:.2f}x, "
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
