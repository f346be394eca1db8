"""Log-likelihoods of multiple-choice questions: lm-eval's HFLM without kernels, and ours.

    python -m pytest benchmarks/integrations/bench_lm_eval.py --size full --out FOLDER

The three take turns over the same token ids, of the lengths that HellaSwag's contexts and endings
(long) and ARC's questions and answers (short) have, about, in Llama 2's tokens. HFLM runs without
kernels by single requests, as Apple's evaluation did, and by batches of 8; and once with our
kernels, which shows what they bring alone.
"""

import copy
import json
import random
import statistics
import time
from pathlib import Path

import pytest
import torch
from helpers.tokenizers import hugging_face

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.bench.benchmark import shape_of
from elmkernels.bench.timing import fingerprint

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

# questions, tokens of a context, tokens of a choice, choices
KINDS = {"long": (4, (55, 120), (14, 40), 4), "short": (10, (20, 50), (2, 12), 4)}
SMALL = {"long": (2, (20, 30), (3, 9), 4), "short": (3, (5, 9), (1, 3), 4)}


def draw(kind, vocabulary: int, seed: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Requests as lm-eval gives them to a model, choices of a question one after another."""
    questions, contexts, choices, count = kind
    drawn, found = random.Random(seed), []
    for q in range(questions):
        context = [1, *(drawn.randrange(3, vocabulary) for _ in range(drawn.randint(*contexts)))]
        for c in range(count):
            choice = [drawn.randrange(3, vocabulary) for _ in range(drawn.randint(*choices))]
            found.append(((f"question {q}", f"choice {c}"), context, choice))
    return found


def runners(config: OpenELMConfig, folder: Path) -> dict:
    """How each scores requests."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from elmkernels import hf
    from elmkernels.evaluation.lm import OpenELMLM
    from elmkernels.openelm import Tokenizer

    file = hugging_face(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )

    drawn = OpenELM(config, seed=0, dtype=torch.bfloat16).eval()

    def model() -> OpenELM:
        return copy.deepcopy(drawn)

    def hflm(kernels: str | None, batch: int) -> HFLM:
        wrapped = hf.OpenELMForCausalLM.from_openelm(model()).eval()
        if kernels is not None:
            wrapped.accelerate(kernels)
        return HFLM(
            pretrained=wrapped, tokenizer=words, add_bos_token=True, batch_size=batch,
            max_length=config.max_context_length,
        )  # fmt: skip

    plain, batched = hflm(None, 1), hflm(None, 8)
    ours = model()
    accelerate(ours)
    found = {
        "HFLM, no kernels, single requests": plain,
        "HFLM, no kernels, batches of 8": batched,
        "HFLM, our kernels, batches of 8": hflm("auto", 8),
        "elmkernels": OpenELMLM(ours, Tokenizer(file)),
    }
    return {
        name: lambda requests, lm=lm: lm._loglikelihood_tokens(requests, disable_tqdm=True)
        for name, lm in found.items()
    }


def measure(runs: dict, requests: list, rounds: int) -> dict:
    """Median seconds of each, taking turns, and how far its scores are from the first's."""
    seconds, scores = {name: [] for name in runs}, {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            scores[name] = run(requests)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
    first = next(iter(runs))
    sums = torch.tensor([score for score, _ in scores[first]])
    tokens = sum(len(context) + len(choice) - 1 for _, context, choice in requests)
    found = {}
    for name in runs:
        differ = (torch.tensor([score for score, _ in scores[name]]) - sums).abs() / sums.abs()
        median = statistics.median(seconds[name])
        found[name] = {
            "seconds": median,
            "all_seconds": seconds[name],
            "requests_per_second": len(requests) / median,
            "given_tokens_per_second": tokens / median,
            "largest_relative_difference": float(differ.max()),
        }
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods(benchmark, full, request, tmp_path, kind):
    config = shape_of("OpenELM-270M", full)
    requests = draw((KINDS if full else SMALL)[kind], config.vocab_size, seed=0)
    with torch.no_grad():
        runs = runners(config, tmp_path)
        found = benchmark.pedantic(
            measure, (runs, requests, 3 if full else 1), rounds=1, iterations=1
        )
    ours = found["elmkernels"]
    for name, row in found.items():
        assert row["largest_relative_difference"] < 0.02, f"{name} is not the model"
        row["elmkernels_is"] = row["seconds"] / ours["seconds"]
    results = {
        "kind": kind, "questions": len(requests) // 4, "requests": len(requests),
        "model": config.model_name or "small", "weights": "random weights of seed 0",
        "dtype": "bfloat16", "machine": fingerprint("cpu"), "runners": found,
    }  # fmt: skip
    benchmark.extra_info.update(results)
    out = request.config.getoption("--out")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"{kind}.json").write_text(json.dumps(results, indent=1) + "\n")
