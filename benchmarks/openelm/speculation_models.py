"""The target and the draft that bench_speculation.py measures, trained for minutes on two cores.

Text: sources of Python's library. A third are files as they are, the rest are edits: a function,
what changes in it ("# old -> new", a name or a constant), the function after that, three times in
a row. A model that has learned them writes an edited function by copying it.

Copying takes two steps of attention: a head that looks at the token before, and a later head that
looks for where the same tokens stood and says what followed. A model finds that after a hundred
million tokens or more; minutes are one million. So both models begin with such heads (`begin`),
and everything is trained from there.
"""

import ast
import json
import random
import re
import signal
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from elmkernels import OpenELM
from elmkernels.cli.main import main as elmkernels
from elmkernels.openelm import OpenELMConfig

VOCABULARY = 2048
END = "<eos>"
# Held out: training sees none of their files.
HELD_OUT = ("email", "http", "json")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EDITS = 3  # of a function, one after another
SHAPE = {
    "head_dim": 64, "num_gqa_groups": 4, "ffn_dim_divisor": 64, "vocab_size": VOCABULARY,
    "normalize_qk_projections": True, "share_input_output_layers": True,
    "rope_max_length": 2048, "max_context_length": 1024,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "target": SHAPE
    | {"num_transformer_layers": 8, "model_dim": 768}
    | {"qkv_multipliers": [0.67, 1.0], "ffn_multipliers": [0.5, 4.0]},
    "draft": SHAPE
    | {"num_transformer_layers": 4, "model_dim": 256}
    | {"qkv_multipliers": [2.0, 2.0], "ffn_multipliers": [0.5, 2.0]},
}
STEPS = {"target": 420, "draft": 400}
LENGTH = 1024  # tokens of a step
RATES = {"target": 8e-4, "draft": 1e-3}
QUICK: dict[str, Any] = {
    "num_transformer_layers": 3, "model_dim": 64, "qkv_multipliers": [8.0, 8.0],
    "ffn_multipliers": [1.0, 1.0], "vocab_size": 512,
}  # fmt: skip

# What the first heads are made of. Ratios of sizes in the residual stream to that of embeddings:
# a direction that all tokens share, what is told of tokens before, what is said of the next one.
COMMON, BEFORE, COPY = 0.5, 0.7, 10.0
NEAR, FAR = 4.0, 2.5  # weights of the norms of queries and keys: how sharply heads look
FAST, SLOW = 6, 18  # pairs of a head that tell neighbours apart; from which on none tells far ones
BACK = 2  # tokens that must have stood there
COPYING = (1, 2)  # layers whose first heads copy


def sources(held_out: bool) -> Iterator[str]:
    """The texts of Python's library, of the held-out folders or of all others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not LEFT_OUT & set(parts) and (parts[0] in HELD_OUT) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")


def functions(text: str) -> list[str]:
    """The functions of a source, of a length that edits of one fit a sequence."""
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
    """(how a name or a number of a function is to change, the function after that); None if it
    has none.
    """
    try:
        nodes = list(ast.walk(ast.parse(function)))
    except SyntaxError:
        return None
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own = sorted(own - {"self", "cls"})
    numbers = sorted(set(re.findall(r"(?<![\w.])\d{1,3}(?![\w.])", function)))
    if not own and not numbers:
        return None
    if numbers and (not own or draw.random() < 0.3):
        old, new = draw.choice(numbers), str(draw.randrange(1000))
    else:
        old, new = draw.choice(own), draw.choice(names)
    if re.search(rf"\b{new}\b", function):
        return None
    return f"\n# {old} -> {new}\n", re.sub(rf"(?<![\w.]){old}\b", new, function)


def edits(texts: list[str], seed: int, most: int = EDITS) -> list[tuple[str, str]]:
    """Of each function that can be edited: (it and all edits but the text of the last, that)."""
    draw = random.Random(seed)
    found = [function for text in texts for function in functions(text)]
    names = sorted({name for f in found for name in re.findall(r"\b[a-z][a-z_]{2,11}\b", f)})
    made = []
    for function in found:
        before, last = function, ""
        for _ in range(most):
            pair = edit(last or function, names, draw)
            if pair is not None:
                before += last if last else ""
                before, last = before + pair[0], pair[1]
        made += [(before, last)] if last else []
    draw.shuffle(made)
    return made


def prepare(folder: Path, vocabulary: int, most: int | None = None) -> None:
    """Write the texts of training and a tokenizer of them. most: characters of files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    texts = list(sources(held_out=False))
    random.Random(0).shuffle(texts)
    while most is not None and sum(map(len, texts)) > most:
        texts.pop()
    pairs = [before + after for before, after in edits(texts, seed=1)]
    room = sum(map(len, pairs)) // 2
    while sum(map(len, texts)) > room and len(texts) > 1:
        texts.pop()
    documents = texts + pairs
    random.Random(2).shuffle(documents)
    for name, some in (("train", documents), ("validation", list(sources(held_out=True)))):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in some)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def _parts(layer: Any) -> tuple[Any, tuple[Tensor, ...], Tensor]:
    """(attention, its weights of queries, keys and values, that of its output)"""
    a = layer.attn
    sizes = [n * a.head_dim for n in (a.q_heads, a.kv_heads, a.kv_heads)]
    return a, a.qkv_proj.weight.split(sizes), a.out_proj.weight


@torch.no_grad()
def begin(model: OpenELM, seed: int = 1) -> OpenELM:
    """The first weights: of the first layer the heads of two groups look at one and two tokens
    before, of the layers COPYING those of one group look for where the last BACK tokens stood
    before, and say what followed. All else adds nothing yet.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    head, width, half = config.head_dim, config.model_dim, config.head_dim // 2
    embedding = model.token_embeddings.weight
    size = embedding.norm(dim=1).mean()
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].t()
    common, used = basis[0], 1
    embedding -= torch.outer(embedding @ common, common)
    embedding += COMMON * size * common
    layers: list[Any] = list(model.layers)
    for layer in layers:
        layer.ffn.proj_2.weight.zero_()
        layer.attn.out_proj.weight.zero_()
    slow = [*range(SLOW, half), *range(half + SLOW, head)]
    each = len(slow) // BACK
    content = torch.randn(each, width, generator=generator) / width**0.5
    content -= torch.outer(content @ common, common)
    a, (q, k, v), out = _parts(layers[0])
    group = head * a.q_heads // a.kv_heads
    look = torch.zeros(head)
    look[:FAST] = 1
    angles = 10000.0 ** (-torch.arange(half) / half)
    told: list[Tensor] = []
    for i in range(BACK):
        cos, sin = (angles * (i + 1)).cos(), (angles * (i + 1)).sin()
        turned = torch.cat((look[:half] * cos, look[:half] * sin))
        k[i * head : (i + 1) * head] = torch.outer(turned, common)
        v[i * head : (i + 1) * head] = 0
        v[i * head : i * head + each] = content * size * BEFORE / each**0.5
        told.append(basis[used : used + each])
        used += each
        for h in range(i * group, (i + 1) * group, head):
            q[h : h + head] = torch.outer(look, common)
            out[:, h : h + each] = told[i].t() * head / group
    a.q_norm.weight.fill_(NEAR)
    a.k_norm.weight.fill_(NEAR)
    scale = each**0.5 / size / BEFORE
    for n in COPYING:
        a, (q, k, v), out = _parts(layers[n])
        group = head * a.q_heads // a.kv_heads
        said = basis[-head:] if n == COPYING[0] else basis[-2 * head : -head]
        if width < used + 2 * head:  # a small model has no room for two
            said = basis[-head:]
        v[:head] = said * size * COPY / head**0.5
        sought = torch.zeros(head, width)
        k[:head] = 0
        for i in range(BACK):
            dims = slow[i::BACK][:each]
            k[dims] = told[i] * scale
            sought[dims] = content if i == 0 else told[i - 1] * scale
        for h in range(0, group, head):
            q[h : h + head] = sought
            out[:, h : h + head] = said.t() * head / group
        a.q_norm.weight.fill_(FAR)
        a.k_norm.weight.fill_(FAR)
    return model


def recipe(folder: Path, name: str, steps: int, length: int) -> dict[str, Any]:
    """How a model is trained, as `elmkernels train` reads it."""
    often = max(1, steps // 8)
    return {
        "initial": str(folder / f"{name}-first"),
        "data": {
            "train": [str(folder / "train.jsonl")],
            "validation": [str(folder / "validation.jsonl")],
            "tokenizer": str(folder / "tokenizer.json"),
            "sequence_length": length,
        },
        "batch": {"sequences": 1, "micro": 1},
        "schedule": {
            "steps": steps, "warmup_steps": max(1, steps // 20),
            "max_lr": RATES[name], "min_lr": RATES[name] / 20,
        },
        "keep": {
            "checkpoint_every": often, "checkpoints": 1, "average": 0,
            "evaluate_every": steps, "evaluate_sequences": 8,
        },
    }  # fmt: skip


def train(folder: Path, minutes: float, steps: dict[str, int], **shape: Any) -> bool:
    """Train what isn't trained yet, for so long at most; whether both models are there."""
    end = time.monotonic() + 60 * minutes
    for name, count in steps.items():
        done = folder / name / "done"
        if done.exists():
            continue
        first = folder / f"{name}-first"
        if not first.exists():
            config = OpenELMConfig(**MODELS[name] | shape)
            begin(OpenELM.from_config(config, seed=0, dtype=torch.float32)).save_pretrained(first)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe(folder, name, count, 64 if shape else LENGTH)))
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
