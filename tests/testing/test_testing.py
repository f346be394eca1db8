"""The instruments: parity must fail what is wrong, timing must order what it times."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from elmkernels.bench.baselines.of_ops import baselines
from elmkernels.bench.ops import run_bench
from elmkernels.bench.table import format_table
from elmkernels.bench.timing import copies_beyond_cache, fingerprint, interleave, summary
from elmkernels.testing import CASES, OPS, bench_cases, check_parity, compare, make, run_parity
from elmkernels.testing.cases.attention import mixed_lengths
from elmkernels.testing.parity import poisoned
from elmkernels.testing.rule import ulp

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sample():
    """truth, and the reference's result: truth rounded to bfloat16."""
    truth = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return truth, truth.bfloat16()


def truncated(x):
    return (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def test_the_yardstick_itself_passes(sample):
    truth, rounded = sample
    assert compare(truth, rounded, rounded).ok


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda truth, y: truncated(truth), "rms error"),
        (lambda truth, y: y * 1.01, "error"),
        (lambda truth, y: y.index_fill(0, torch.tensor([3]), 0), "max error"),
        (lambda truth, y: y.where(truth < 3, float("nan")), "not finite"),
        (lambda truth, y: y.where(truth < 3, float("inf")), "not finite"),
        (lambda truth, y: y.float(), "dtype must be torch.bfloat16, got torch.float32"),
        (lambda truth, y: y[:, :63], r"shape must be [64, 64], got [64, 63]"),
        (lambda truth, y: torch.zeros_like(y), "max error"),
    ],
)
def test_what_is_wrong_fails(sample, spoil, reason):
    truth, rounded = sample
    comparison = compare(truth, rounded, spoil(truth, rounded))
    assert not comparison.ok
    assert reason in comparison.reason


def test_a_yardstick_that_overflows_is_no_yardstick(sample):
    truth, rounded = sample
    with pytest.raises(ValueError, match="y must be finite"):
        compare(truth, rounded / 0, rounded, "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulp_is_the_distance_to_the_next_number(dtype):
    for value in (1.0, 1.5, 3.9, 4.0, 1000.0, torch.finfo(dtype).smallest_normal / 4):
        x = torch.tensor(value, dtype=dtype)
        step = torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype)) - x
        assert ulp(float(x), dtype) == step.item()


def test_new_memory_is_poisoned_and_the_setting_restored():
    with poisoned():
        assert torch.empty(9).isnan().all()
        assert torch.randn(3).new_empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_names_of_cases_are_unique_and_inputs_repeatable():
    for op, cases in CASES.items():
        cases = [*cases, *bench_cases(op)]
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
    case = CASES["rms_norm"][0]
    first, second = (make(case, torch.bfloat16, seed=3)[0][0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.requires_grad
    assert not torch.equal(first, make(case, torch.bfloat16, seed=4)[0][0])


@pytest.mark.parametrize("op", CASES)
def test_the_reference_has_parity_with_itself(op):
    record = check_parity(op, CASES[op][0], torch.bfloat16, "reference")
    assert record.ok
    assert record.worst.ratio in (0, 1)
    assert {c.what for c in record.comparisons} >= {"grad " + n for n in ("x",) if op == "rms_norm"}


def test_run_parity_reports_every_record():
    seen = []
    records = run_parity(["swiglu"], ["float32"], ["reference"], progress=seen.append)
    assert records == seen
    assert len(records) == sum(torch.float32 in case.dtypes for case in CASES["swiglu"])
    assert "parity" in format_table([r.row() for r in records]).splitlines()[0]


def test_a_name_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="op must be one of .*, got 'gelu'"):
        run_parity(["gelu"])
    with pytest.raises(RuntimeError, match="can't run rms_norm on cpu here: there is no such"):
        run_parity(["rms_norm"], backends=["mps"])
    with pytest.raises(RuntimeError, match="backend 'sdpa' can't run rms_norm"):
        run_bench(["rms_norm"], backends=["sdpa"])


def test_a_slower_rival_has_the_larger_median():
    times = interleave(
        {"long": lambda: time.sleep(0.004), "short": [lambda: time.sleep(0.001)] * 3},
        min_time=0.02, rounds=3, warm_up=0.005,
    )  # fmt: skip
    assert times["short"].median < times["long"].median
    assert times["long"].p20 <= times["long"].median <= times["long"].p80
    assert times["long"].n >= 3


def test_summary_interpolates():
    timing = summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (timing.median, timing.n) == (3.0, 5)
    assert timing.p20 == pytest.approx(1.8)
    assert timing.p80 == pytest.approx(4.2)


def test_peak_memory_sees_what_is_freed():
    """In a fresh process: here the allocator may hold enough from other tests to hide the call."""
    code = "import torch; from elmkernels.bench.timing import peak_memory as p; print(p({call}))"
    command = [sys.executable, "-c", code.format(call="lambda: torch.randn(1 << 24)")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 0.8 * (4 << 24) <= int(done.stdout) <= 2 * (4 << 24)


def test_copies_beyond_cache_are_bounded():
    assert copies_beyond_cache(1 << 40, "cpu") == 1
    assert copies_beyond_cache(1, "cpu") == 64


def test_a_benchmark_record_has_its_rivals_and_its_parity():
    forward, both = run_bench(["rms_norm"], ["float32"], ["reference"], quick=True, rows=[2])
    assert not forward.backward
    assert both.backward
    assert set(forward.baselines) >= {"eager"}
    # x, weight and y, 2048 wide; the backward reads dy, x and weight and writes dx and dweight.
    assert forward.nbytes == 4 * 2048 * (2 + 1 + 2)
    assert both.nbytes == forward.nbytes + 4 * 2048 * (2 + 2 + 1 + 2 + 1)
    assert forward.parity
    assert forward.row()["parity"] == "ok"
    assert forward.json()["time"]["n"] >= 1


def test_rivals_of_packed_documents_compute_them():
    case = next(c for c in CASES["attention"] if c.name == "varlen_short")
    args, kwargs = make(case, torch.float32)
    found = baselines("attention", args, kwargs, torch.device("cpu"), compiled=False)
    assert set(found) == {"reference", "eager", "documents"}
    for name in ("eager", "documents"):
        torch.testing.assert_close(
            found[name](*args, **kwargs), found["reference"](*args, **kwargs)
        )
    lengths = kwargs["cu_seqlens"].diff()
    pairs = int((lengths * (lengths + 1) // 2).sum())
    assert OPS["attention"].operations(args, kwargs, False) == 4 * 8 * 64 * pairs
    assert sum(mixed_lengths(4096)) == 4096


def test_format_table_aligns_and_leaves_out_empty_columns():
    text = format_table([{"name": "a", "us": 1.5, "none": None}, {"name": "bcd", "us": 20000.0}])
    assert text.splitlines() == ["name        us", "a          1.5", "bcd   2.00e+04"]
    assert format_table([]) == ""


def test_fingerprint_names_the_machine():
    found = fingerprint()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
