"""The highest resident set of a forward and backward of the loss, beside its baselines.

Each measurement has a process of its own, as memory that an allocator kept counts for nothing. The
gradients themselves are in every figure: `extra_info["gradients"]` says how much they are. Smoke
measures eager alone beside ours. With `--benchmark-json FILE` the figures go to a file;
pytest-benchmark's own is the time of a child.
"""

import multiprocessing

import pytest
import torch

from elmkernels.bench.baselines.of_ops import baselines
from elmkernels.bench.timing import peak_memory
from elmkernels.testing import bench_cases, make

OP = "linear_cross_entropy"
OURS = "ours"
# As few as show it: in bfloat16 ours keeps a float32 sum, which the logits must outweigh.
SMOKE_ROWS = {torch.float32: 512, torch.bfloat16: 2048}


def one(model: str, rows: int, dtype: torch.dtype, queue, name: str) -> None:
    from elmkernels import linear_cross_entropy

    (case,) = bench_cases(OP, (rows,), model)
    args, kwargs = make(case, dtype)
    small, _ = make(bench_cases(OP, (8,), model)[0].check, dtype)
    fn = linear_cross_entropy
    if name != OURS:
        fn = baselines(OP, args, kwargs, torch.device("cpu"), False)[name]
    torch.autograd.grad(fn(*small), small[:2])  # libraries choose their kernels
    leaves = [a for a in args if a.requires_grad]
    queue.put(peak_memory(lambda: torch.autograd.grad(fn(*args, **kwargs), leaves)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the memory of a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["270M", "1_1B"])
def test_peak_memory(benchmark, full, model, dtype):
    if model != "270M" and not full:
        pytest.skip("for figures")
    rows = 4096 if full else SMOKE_ROWS[dtype]
    context = multiprocessing.get_context("spawn")
    (case,) = bench_cases(OP, (rows,), model)
    args, kwargs = make(case, dtype)
    names = [
        OURS,
        *(baselines(OP, args, kwargs, torch.device("cpu"), False) if full else ["eager"]),
    ]
    gradients = sum(a.nbytes for a in args[:2])
    del args
    peaks = {}

    def measure() -> None:
        for name in names:
            queue = context.SimpleQueue()
            child = context.Process(target=one, args=(model, rows, dtype, queue, name))
            child.start()
            child.join()
            assert child.exitcode == 0, name
            peaks[name] = queue.get()

    benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info.update(
        model=model, rows=rows, dtype=str(dtype).removeprefix("torch."), gradients=gradients,
        peaks=peaks, share_of_eager=peaks[OURS] / peaks["eager"],
    )  # fmt: skip
    assert peaks[OURS] < peaks["eager"]
