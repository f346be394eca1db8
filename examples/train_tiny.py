"""Train a tiny model on the bytes of a file, in a loop of your own, and let it write.

    python examples/train_tiny.py --steps 300 --text README.md

`elmkernels train` does this from a recipe, with checkpoints, resuming and a log.
"""

import argparse
from pathlib import Path

import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate, generate
from elmkernels.openelm import next_tokens

CONFIG = OpenELMConfig(
    num_transformer_layers=3, model_dim=96, head_dim=32, num_gqa_groups=1, vocab_size=256,
    qkv_multipliers=1.0, ffn_multipliers=(1.0, 3.0), ffn_dim_divisor=32,
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
    model = OpenELM.from_config(CONFIG, seed=0)
    accelerate(model)  # forward and backward; the Parameters stay the same objects
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(args.steps):
        starts = torch.randint(len(data) - args.length, (args.batch,)).tolist()
        ids = torch.stack([data[s : s + args.length] for s in starts])
        loss = model.loss(ids, next_tokens(ids), z_loss=1e-4)  # no logits lie in memory
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    prompt = [list(b"import ")]
    (row,) = generate(model.eval(), prompt, 32, temperature=0.8, seed=0, stop_tokens=())
    print(bytes(row.tokens).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
