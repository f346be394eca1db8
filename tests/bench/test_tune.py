"""What a kind of processor decides is held to this machine: rows that hold, rows to add."""

import json

import pytest
import torch

from elmkernels import processors
from elmkernels.backends import SDPA, choose
from elmkernels.bench import tune
from elmkernels.bench.timing import Timing
from elmkernels.cli.main import main
from elmkernels.processors import ATTENTION, BF16, GROUPED, KIND, OWN, SERVED, Row

SMALL = tune.TuneSizes(8, 1, 128, (9, 17), 0.0, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tune, "SIZES", SMALL)


@pytest.fixture
def times(monkeypatch):
    """Seconds of each choice by its name, instead of measured ones; others take 1."""
    given: dict[str, float] = {}

    def timed(calls, sizes):
        for call in calls.values():
            call()
        seconds = {name: given.get(name, 1.0) for name in calls}
        return {name: Timing(s, s, s, 1) for name, s in seconds.items()}

    monkeypatch.setattr(tune, "_timed", timed)
    return given


def rows_of_this_kind(monkeypatch, attention=OWN, grouped=24):
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setitem(ATTENTION, (KIND, dtype), Row(attention, "here"))
    for bits in tune.FORMATS:
        monkeypatch.setitem(GROUPED, (KIND, bits, torch.bfloat16), Row(grouped, "here"))


def test_rows_that_hold(monkeypatch, times):
    rows_of_this_kind(monkeypatch)
    times["layers"] = 1.05
    found = list(tune.findings())
    assert all(f.holds and f.add is None for f in found)
    assert tune.lines(found) == ["every row holds here (within 1.1x of the best)"]
    assert {f.where for f in found} >= {"ATTENTION", "GROUPED"}


def test_rows_to_add(monkeypatch, times):
    """Of each table what was fastest here, in the words of the table."""
    rows_of_this_kind(monkeypatch)
    times |= {SDPA: 0.5, "layers": 0.25}
    found = list(tune.findings())
    if choose("attention", "cpu", None) != SDPA:
        wrong = [f for f in found if f.where == "ATTENTION"]
        assert [f.best for f in wrong] == [SDPA, SDPA] and [f.ratio for f in wrong] == [2.0, 2.0]
        assert wrong[0].add.startswith(f'({KIND!r}, torch.bfloat16): Row("sdpa", "')
    wrong = [f for f in found if f.where == "GROUPED"]
    assert [f.ratio for f in wrong] == [4.0] * 4
    assert wrong[2].add.startswith(f'({KIND!r}, 8, torch.bfloat16): Row(8, "')
    said = tune.lines(found)
    assert "rows to add to processors.GROUPED:" in said and f"  {wrong[2].add}" in said
    rows = {}
    for f in found:
        if f.where in ("ATTENTION", "GROUPED") and f.add:
            rows |= eval(f"{{{f.add}}}", {"torch": torch, "Row": Row, "OWN": OWN})
    assert all(row.where and row.choice in (SDPA, 8) for row in rows.values())


def test_groups_that_are_faster_for_longer(monkeypatch, times):
    rows_of_this_kind(monkeypatch, grouped=9)
    times["layers"] = 1.5
    found = [f for f in tune.findings() if f.where == "GROUPED"]
    assert {(f.taken, f.best, f.ratio) for f in found} == {("up to 9 rows", "up to 17 rows", 1.5)}


def test_a_kind_without_rows_is_told(monkeypatch, times):
    """It takes those of the kind that was measured most, which may hold."""
    monkeypatch.setattr(tune, "KIND", "another")
    found = list(tune.findings())
    tables = [f for f in found if f.where in ("ATTENTION", "GROUPED")]
    assert all(f.holds and f.add.startswith("('another', ") for f in tables)
    assert {f.row()["the row"] for f in tables} == {"holds, but has no row of this kind"}


def test_every_row_says_where_it_was_measured():
    kinds = {processors.TILES, BF16, processors.AVX512, processors.AVX2, processors.OTHER}
    for table in (ATTENTION, GROUPED, SERVED):
        for key, row in table.items():
            assert key[0] in kinds and "cores" in row.where
    assert KIND in kinds
    assert processors.row({(BF16, 1): "most"}, 1) == "most"
    assert processors.row({(BF16, 1): "most", (KIND, 1): "own"}, 1) == "own"
    assert processors.row({("another", 1): "other"}, 1) is None


def test_info_tune(capsys):
    assert main(["info", "--tune", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"what a processor of the kind {KIND} decides (measured now)" in out
    assert "attention, 1_1B_rows_8, bfloat16" in out and "batches in groups, int4" in out
    assert "every row holds here" in out or "rows to add to " in out
    assert main(["info", "--tune", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["processor"] == KIND
    assert all(f["ratio"] >= 1 and f["holds"] == (f["ratio"] <= 1.1) for f in found["tuned"])
