"""How near to their limit kernels come, by one evaluation of the reference and by all of them."""

import json

import pytest
import torch

from docs.generate import figures, margins
from elmkernels.cli.main import main
from elmkernels.reference import swiglu
from elmkernels.testing import CASES
from elmkernels.testing.margins import CLOSE, Margin, Margins, close_tensors
from elmkernels.testing.parity import EVALUATIONS, Expected, specification

CASE = {op: {case.name: case for case in cases} for op, cases in CASES.items()}


def expected(op="attention", name="one_key_outweighs", dtype=torch.float32):
    return Expected(op, CASE[op][name], dtype)


def test_the_reference_itself_is_not_close():
    assert close_tensors(expected(), specification("attention")) == []


def test_a_wrong_kernel_is_beyond_its_limit_by_all():
    found = close_tensors(expected("swiglu", "width_33"), lambda x: 1.01 * swiglu(x))
    assert {margin.what for margin in found} == {"y", "grad gate_up"}
    assert all(margin.by_all > 1 for margin in found)
    assert not Margins("swiglu", "float32", "avx2", 1, found).ok


def test_all_evaluations_allow_what_the_best_of_them_allows_and_no_less_than_one():
    """Beside a reference that is right by luck each right kernel is close by that evaluation."""
    lucky = expected()
    plain = lucky.evaluated[0]
    lucky.evaluated[0] = {what: t.to(plain[what].dtype) for what, t in lucky.truth.items()}
    found = close_tensors(lucky, specification("attention", 101))
    assert any(margin.by_one > 1 for margin in found)
    got = lucky.results(specification("attention", 101))
    for margin in found:
        each = [
            next(c for c in lucky.judge(got, (i,)) if c.what == margin.what)
            for i in range(EVALUATIONS)
        ]
        assert margin.by_one == each[0].used > CLOSE
        assert max(c.used for c in each) == margin.by_one >= margin.by_all
        most = max(c.max_allowed for c in each), max(c.rms_allowed for c in each)
        shares = each[0].max_error / most[0], each[0].rms_error / most[1]
        assert margin.by_all == max(shares) < 1


def test_a_line_counts_cases_not_tensors():
    close = [
        Margin("a", "y", 1.2, 0.7),
        Margin("a", "grad x", 0.8, 0.5),
        Margin("b", "y", 0.7, 0.6),
    ]
    row = Margins("swiglu", "float32", "avx2", 9, close).row()
    assert (row["cases"], row["one fails"], row["one is close"], row["all are close"]) == (
        9,
        1,
        2,
        1,
    )
    assert (row["nearest"], row["share"]) == ("a: y", 0.7)


@pytest.fixture
def few_cases(monkeypatch):
    for op in CASES:
        monkeypatch.setitem(CASES, op, CASES[op][:2])


def test_the_command_counts_margins(capsys, few_cases):
    argv = ["parity", "attention", "--dtype", "fp32", "--backend", "sdpa", "--margins", "--json"]
    assert main(argv) == 0
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["cases"] == 2 and record["ok"]


def test_what_the_document_says_of_float32_is_what_the_files_hold():
    for name in margins.PROCESSORS:
        found = figures.results(f"parity-cpu-{name}")
        assert found["complete"] and all(record["ok"] for record in found["records"])
        assert {record["op"] for record in found["records"]} == set(CASES)
        close = [m for r in found["records"] if r["dtype"] == "float32" for m in r["close"]]
        assert all(margin["by_all"] <= CLOSE for margin in close)
