"""A few small cases of every op, for tools that watch a whole process:

compute-sanitizer --tool memcheck python -m elmkernels.gpu_check.sanitizer_cases --device cuda
"""

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch

from ..testing.cases import CASES
from ..testing.cases.draw import Case, make
from ..testing.parity import check_parity, plan

MOST_ELEMENTS = 1 << 16


def few_cases(op: str, count: int) -> list[Case]:
    """The op's first `count` cases of few elements."""
    return list(itertools.islice(_small(op), count))


def _small(op: str) -> Iterator[Case]:
    for case in CASES[op]:
        args, _ = make(case, case.dtypes[0], "cpu", 0)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if sum(t.numel() for t in tensors) <= MOST_ELEMENTS:
            yield case


def main(argv: list[str] | None = None) -> int:
    """Run them on every backend of a device, printing each verdict; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=2, help="of each op")
    parser.add_argument("ops", nargs="*")
    args = parser.parse_args(argv)
    failed = 0
    for op, backend in plan(args.ops or None, None, args.device):
        for case in few_cases(op, args.cases):
            record = check_parity(op, case, case.dtypes[-1], backend, args.device)
            failed += not record.ok
            print(op, backend, case.name, record.dtype, "ok" if record.ok else "FAILED", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
