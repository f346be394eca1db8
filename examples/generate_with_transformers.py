"""Generate with transformers on this package's kernels, a padded batch, and count its tokens a
second beside plain PyTorch.

    pip install 'elmkernels[hf]'
    python examples/generate_with_transformers.py --checkpoint OpenELM-270M --dtype bfloat16
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM

from elmkernels import OpenELM, OpenELMConfig, hf

TINY = OpenELMConfig(
    num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2, vocab_size=256,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), ffn_dim_divisor=16,
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip


def load(checkpoint: str | None, kernels: str | None, dtype: str):
    if checkpoint:
        return AutoModelForCausalLM.from_pretrained(checkpoint, kernels=kernels, dtype=dtype)
    body = OpenELM.from_config(TINY, seed=0, dtype=dtype)
    model = hf.OpenELMForCausalLM.from_openelm(body).eval()
    if kernels:
        model.accelerate(kernels)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a folder (default: a tiny model, random weights)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
    found = []
    for kernels in (None, "auto"):
        model = load(args.checkpoint, kernels, args.dtype)
        model.generation_config.eos_token_id = None
        model.generate(prompts, attention_mask=mask, **options)
        start = time.perf_counter()
        found.append(model.generate(prompts, attention_mask=mask, **options))
        rate = 2 * args.tokens / (time.perf_counter() - start)
        print(f"kernels={kernels!r}: {rate:.0f} tokens/s")
    equal = int((found[0] == found[1])[:, 5:].sum())
    print(f"{equal} of {2 * args.tokens} tokens equal")


if __name__ == "__main__":
    main()
