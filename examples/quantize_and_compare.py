"""Store the weights in fewer bits, and see what that costs: bytes, and how far the logits move.

    python examples/quantize_and_compare.py --checkpoint OpenELM-270M

packed12 holds bfloat16 without loss, so its logits are equal to the last bit. 8 and 4 bits lose.
"""

import argparse

import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize

TINY = OpenELMConfig(
    num_transformer_layers=2, model_dim=128, head_dim=32, num_gqa_groups=2, vocab_size=256,
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip
FORMS = {
    "bfloat16": lambda model: None,
    "packed12": pack,
    "int8": lambda model: quantize(model, bits=8, group_size=64),
    "int4": lambda model: quantize(model, bits=4, group_size=32),
}


def load(checkpoint: str | None) -> OpenELM:
    if checkpoint:
        return OpenELM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return OpenELM.from_config(TINY, seed=0, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a folder (default: a tiny model, random weights)")
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()

    expected = ids = None
    for name, convert in FORMS.items():
        model = load(args.checkpoint)
        done = convert(model)
        accelerate(model)
        if ids is None:
            torch.manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (1, args.tokens))
        with torch.inference_mode():
            logits = model(ids).float()
        expected = logits if expected is None else expected
        moved = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
        print(f"{name:<8} logits move by {moved:.2%}, the likeliest token stays for {same:.0%}")
        print(f"         {done or 'the weights as they were'}")


if __name__ == "__main__":
    main()
