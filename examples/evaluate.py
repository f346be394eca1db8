"""Answer multiple-choice questions by log-likelihoods: contexts are read once for all choices.

    python examples/evaluate.py --checkpoint OpenELM-270M

What lm-eval's tasks need is `elmkernels eval` (docs/evaluation.md); this is what they are made of.
"""

import argparse
import time

import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.evaluation import Request, log_likelihoods

TINY = OpenELMConfig(
    num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2, vocab_size=256,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 2.0), ffn_dim_divisor=16,
    normalize_qk_projections=True, share_input_output_layers=True,
)  # fmt: skip


def questions(count: int, vocab_size: int) -> list[Request]:
    """Random ones, of four choices each."""
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        context = [1, *torch.randint(3, vocab_size, (40,)).tolist()]
        for _ in range(4):
            choice = torch.randint(3, vocab_size, (8,)).tolist()
            found.append(Request((*context, *choice), start=len(context)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a folder (default: a tiny model, random weights)")
    args = parser.parse_args()
    model = OpenELM.from_pretrained(args.checkpoint) if args.checkpoint else OpenELM(TINY, seed=0)
    accelerate(model.eval())
    requests = questions(5, model.config.vocab_size)
    begin = time.perf_counter()
    scores = log_likelihoods(model, requests)
    print(f"{len(requests)} log-likelihoods in {time.perf_counter() - begin:.2f} s")
    for q in range(0, len(scores), 4):
        four = [score.logprob for score in scores[q : q + 4]]
        print(f"question {q // 4}: choice {max(range(4), key=four.__getitem__)} of", *four)
    request = requests[0]
    with torch.no_grad():
        logits = model(torch.tensor([request.ids[:-1]]))[0, request.start - 1 :].float()
    targets = torch.tensor(request.ids[request.start :])
    alone = -torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    print(f"the first alone: equal: {abs(alone - scores[0].logprob) < 1e-2}")


if __name__ == "__main__":
    main()
