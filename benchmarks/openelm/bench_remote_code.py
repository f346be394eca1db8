"""Apple's own code for transformers, eager and accelerated: prompts, and tokens by `generate`.

Runs where the Hub's local cache has that code and transformers is one that it works with. Both take
turns in every round; `extra_info` has their times, the ratios, and how far the logits of each are
from the same model's in float32. Smoke runs two small layers; full runs OpenELM-270M.
"""

import time

import pytest
import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.bench.baselines import remote_code
from elmkernels.bench.benchmark import ACCELERATED, EAGER
from elmkernels.bench.timing import fingerprint, summary

SMALL = OpenELMConfig(
    num_transformer_layers=2,
    model_dim=128,
    head_dim=32,
    num_gqa_groups=2,
    vocab_size=512,
    ffn_dim_divisor=32,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(0.5, 2.0),
    max_context_length=256,
    rope_max_length=512,
    normalize_qk_projections=True,
    share_input_output_layers=True,
)
PROMPT, LONG = 64, 512  # tokens before those that are decoded; of a prompt that is timed


def rms(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth.double()).square().mean().sqrt())


@pytest.mark.skipif(torch.cuda.is_available(), reason="times a CPU")
def test_remote_code(benchmark, full, tmp_path):
    if why := remote_code.missing():
        pytest.skip(why)
    config = OpenELMConfig.from_name("OpenELM-270M") if full else SMALL
    steps, rounds, long = (16, 5, LONG) if full else (4, 2, 96)
    weights, models = OpenELM(config, seed=0, dtype=torch.bfloat16), {}
    for name in (EAGER, ACCELERATED):
        (tmp_path / name).mkdir()
        models[name] = remote_code.build(weights, tmp_path / name, torch.bfloat16)
    report = accelerate(models[ACCELERATED])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, long), generator=generator)

    def seconds(model, prompt: torch.Tensor, new: int) -> float:
        begin = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip
        return time.perf_counter() - begin

    samples = {name: {"prefill": [], "decode": []} for name in models}

    def round_of_both() -> None:
        for name, model in models.items():
            samples[name]["prefill"].append(seconds(model, ids, 1))
            first, all_of_them = (seconds(model, ids[:, :PROMPT], n) for n in (1, 1 + steps))
            samples[name]["decode"].append((all_of_them - first) / steps)

    round_of_both()  # libraries choose their kernels
    for kinds in samples.values():
        kinds.update({kind: [] for kind in kinds})
    benchmark.pedantic(round_of_both, rounds=rounds, iterations=1)
    timings = {
        name: {kind: vars(summary(found)) for kind, found in kinds.items()}
        for name, kinds in samples.items()
    }
    ratios = {
        kind: timings[EAGER][kind]["median"] / timings[ACCELERATED][kind]["median"]
        for kind in ("prefill", "decode")
    }
    with torch.inference_mode():
        logits = {name: model(ids[:, :PROMPT]).logits for name, model in models.items()}
        truth = models[EAGER].float()(ids[:, :PROMPT]).logits
    errors = {name: rms(found, truth) for name, found in logits.items()}
    benchmark.extra_info.update(
        machine=fingerprint(), transformers=__import__("transformers").__version__,
        model="OpenELM-270M" if full else "two small layers", prompt=PROMPT, long=long, steps=steps,
        seconds=timings, ratios=ratios, rms_from_float32=errors, report=str(report),
    )  # fmt: skip
    assert errors[ACCELERATED] <= 1.5 * errors[EAGER]
