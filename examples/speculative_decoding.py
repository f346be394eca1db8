"""Train a target and a small draft on the bytes of Python's library, then let drafts guess.

    python examples/speculative_decoding.py --steps 600 --layers 8 --width 384

A target of 8 million parameters, minutes on two cores. The text is that of plain decoding, whatever
guesses; benchmarks/openelm/bench_speculation.py measures all of it on held-out code.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from elmkernels import OpenELM, accelerate
from elmkernels.cli.main import main as elmkernels
from elmkernels.openelm import stream

PROMPT = b"def __init__(self, name):\n    self.name = name\n\n    def "


def trained(folder: Path, steps: int, layers: int, width: int) -> OpenELM:
    """The ready recipe `tiny` in another size; what is there already is gone on with."""
    sizes = {"model.num_transformer_layers": layers, "model.model_dim": width}
    sizes |= {"schedule.steps": steps, "schedule.warmup_steps": max(1, steps // 10)}
    sizes |= {"keep.evaluate_every": 0, "keep.average": 0, "batch.sequences": 4, "batch.micro": 4}
    options = [f"--set={name}={value}" for name, value in sizes.items()]
    if elmkernels(["train", "tiny", "--device", "cpu", "--out", str(folder), *options]):
        raise SystemExit(f"{folder} isn't trained to the end")
    model = OpenELM.from_pretrained(folder / "final", dtype=torch.bfloat16).eval()
    accelerate(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="of the models (default: nothing is kept)")
    for name, default in {"steps": 2, "layers": 2, "width": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        target = trained(folder / "target", args.steps, args.layers, args.width)
        draft = trained(folder / "draft", args.steps, 2, 64)
        expected = None
        for guessing in (None, "lookup", "self", draft):
            run = stream(target, [list(PROMPT)], 64, draft=guessing, stop_tokens=())
            start = time.perf_counter()
            tokens = [token for (token,) in run]
            expected = expected or tokens
            said = "plain" if run.speculation is None else run.speculation.results()
            print(f"{64 / (time.perf_counter() - start):.0f} tokens/s, {said}")
            print("tokens equal" if tokens == expected else f"other tokens: {tokens}")


if __name__ == "__main__":
    main()
