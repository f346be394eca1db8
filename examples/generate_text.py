"""Load a model and generate text: a prompt goes in as text, what follows comes out as text.

    python examples/generate_text.py --checkpoint OpenELM-270M --prompt "Once upon a time"

A checkpoint is a Hugging Face folder with its tokenizer in it. Without one, a tiny model of random
weights writes random bytes, which shows the calls.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from elmkernels import OpenELM, OpenELMConfig, accelerate
from elmkernels.openelm import Tokenizer, stream
from elmkernels.training.data.tokenizers import save as save_bytes


def tiny_checkpoint(folder: Path) -> Path:
    """A model of random weights over bytes, and its tokenizer.json."""
    config = OpenELMConfig(
        num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2, vocab_size=257
    )
    OpenELM.from_config(config).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | save_bytes(folder)))
    return folder


def write(folder: Path, prompt: str, tokens: int) -> None:
    """Print what the model of a folder writes after a prompt, as it comes."""
    model = OpenELM.from_pretrained(folder, dtype=torch.bfloat16)
    print(accelerate(model))  # what was accelerated, by which backend, and what was left
    tokenizer = Tokenizer.from_pretrained(folder)
    run = stream(model, [prompt], tokens, tokenizer=tokenizer)  # ends where the checkpoint says
    for piece in run.text():  # a character may take several tokens
        print(piece, end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a folder (default: a tiny random model)")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as made:
        write(args.checkpoint or tiny_checkpoint(Path(made) / "tiny"), args.prompt, args.tokens)


if __name__ == "__main__":
    main()
