"""Accelerate a model and verify it: logits, loss and every gradient against the model before.

    python examples/accelerate_and_verify.py --checkpoint OpenELM-270M --dtype bfloat16

The rule is docs/parity.md's: the reference in a wider dtype is the truth, and the error that the
reference itself makes in this dtype is the measure of what is allowed.
"""

import argparse
import sys

import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.surgery import twin
from elmkernels.testing.model_parity import check_model

TINY = OpenELMConfig(
    num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2, vocab_size=256,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), ffn_dim_divisor=16,
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a folder (default: a tiny model, random weights)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    if args.checkpoint:
        model = OpenELM.from_pretrained(args.checkpoint, dtype=dtype)
    else:
        model = OpenELM.from_config(TINY, seed=0, dtype=dtype)
    fast = twin(model)  # other modules, the same Parameters
    report = accelerate(fast)
    ids = torch.randint(model.config.vocab_size, (2, args.tokens))

    parity = check_model(model, fast, ids, steps=8, plan=report.gemm)
    for row in parity.rows():
        print(f"{row['parity']:<8} {row['count']:>4} x {row['tensor']}: "
              f"{row['max error']:.2e} of {row['allowed']:.2e} allowed")  # fmt: skip
    print(f"{parity.greedy.equal} of {parity.greedy.steps} greedy tokens equal in every row")
    print(f"rule: {parity.rule}")
    return 0 if parity.ok else 1


if __name__ == "__main__":
    sys.exit(main())
