"""Benchmark one kernel against another: the backends of an op take turns on the same input.

    python examples/compare_kernels.py --rows 4096 --width 2048 --seconds 0.2

Turns matter: a machine that slows down slows all of them. `elmkernels bench ops` measures every op
beside its baselines in this way, with cases from the models and parity beside speed.
"""

import argparse

import torch

from elmkernels import rms_norm
from elmkernels.bench.timing import interleave
from elmkernels.testing import runnable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=0.02, help="of each kernel")
    args = parser.parse_args()

    x = torch.randn(args.rows, args.width).to(getattr(torch, args.dtype))
    weight = torch.rand(args.width).to(x.dtype)

    def call(backend: str):
        return lambda: rms_norm(x, weight, backend=backend)

    names = [*runnable("rms_norm"), "reference"]
    times = interleave({name: call(name) for name in names}, min_time=args.seconds)
    slowest = max(t.median for t in times.values())
    moved = 2 * x.nbytes  # x is read once, y is written once
    for name, t in times.items():
        print(f"{name:<12} {t.median * 1e6:9.1f} us (p20 {t.p20 * 1e6:.1f}, p80 {t.p80 * 1e6:.1f})"
              f"  {moved / t.median / 1e9:6.1f} GB/s  {slowest / t.median:5.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
