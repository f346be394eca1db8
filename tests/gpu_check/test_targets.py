"""What a GPU is to reach, from results as a check writes them: reached, missed, not measured."""

import pytest
import torch

from elmkernels.gpu_check import models, op_units, report, runners
from elmkernels.gpu_check.check import GpuCheck
from elmkernels.gpu_check.targets import LARGE, TARGETS, verdicts

EMPTY: dict = {"device": "cuda:0", "complete": True, "stages": {}}
RATES = {"eager": 100.0, "accelerated, graph": 1300.0, "accelerated, one launch": 1500.0}


def results(**stages: dict) -> dict:
    stage = {"seconds": 1.0, "left_out": {}}
    return EMPTY | {"stages": {name: stage | {"units": units} for name, units in stages.items()}}


def decoding(rates: dict[str, float], context: int = 128, batch: int = 1, model="1_1B") -> dict:
    found = {"state": "done", "model": model, "steps": 32, "batch": batch, "context": context}
    found |= {"times": {}, "missing": {}, "tokens_each": 33, "tokens_per_second": rates}
    return found | {"floor_tokens": 1800.0, "datasheet_tokens": 2000.0}


def op(name: str, nbytes: int, us: float, share: float, **more) -> dict:
    found = {"state": "done", "op": name, "case": "c", "dtype": "bfloat16", "backend": "triton"}
    found |= {"backward": False, "rows": 16384, "nbytes": nbytes, "ratios": {}, "of_copy": 0.5}
    found |= {"time": {"median": us / 1e6}, "bandwidth": nbytes / us * 1e6, "of_datasheet": share}
    return found | {"calls": {}, "parity": True, "of_datasheet_flops": None} | more


def row(found: dict, what: str) -> tuple[str, str]:
    (line,) = (line for line in verdicts(found) if line["target"] == what)
    return line["measured"], line["verdict"]


def test_what_no_one_measured_is_not_called_missed():
    assert {line["verdict"] for line in verdicts(EMPTY)} == {"not measured"}
    found = results(decode={"u": decoding(RATES)})
    assert {line["verdict"] for line in verdicts(found | {"device": "cpu"})} == {"not measured"}
    assert len({t.what for t in TARGETS}) == len(TARGETS)


def test_decoding():
    long = decoding({"eager": 1.0, "accelerated, graph": 9000.0}, context=1024)
    many = decoding({"eager": 1.0, "accelerated, graph": 9000.0}, batch=4)
    found = results(decode={"a": long, "b": many, "c": decoding(RATES)})
    what = "decoding one sequence in bfloat16: 1_1B"
    assert row(found, f"{what} by graph, an H200's") == ("1300 tokens/s", "reached")
    assert row(found, f"{what} by graph, of the floor") == ("65.0%", "reached")
    assert row(found, f"{what} by one launch, an H200's") == ("1500 tokens/s", "missed")
    assert row(found, f"{what} by one launch, of the floor") == ("75.0%", "reached")
    assert row(found, f"{what} beside eager") == ("15x", "reached")
    assert row(found, f"{what} beside compiled") == ("", "not measured")
    rates = RATES | {"compiled": 800.0, "OLMo-1B eager": 90.0, "OLMo-1B compiled": 1600.0}
    found["stages"]["compiled"] = {"units": {"d": decoding(rates)}}
    assert row(found, f"{what} beside compiled") == ("1.88x", "missed")
    assert row(found, f"{what} beside OLMo-1B eager")[1] == "reached"
    assert row(found, f"{what} beside OLMo-1B compiled") == ("0.938x", "missed")


@pytest.mark.parametrize(("form", "rate", "verdict"), [
    ("int8", 2500.0, "missed"), ("int8", 2600.0, "reached"), ("int4", 4000.0, "reached"),
    ("packed12", 1700.0, "missed"),
])  # fmt: skip
def test_other_forms_beside_their_own_bfloat16(form, rate, verdict):
    unit = decoding(RATES | {runners.OTHER_FORMS[form]: rate}, model="270M")
    found = results(decode={"u": unit})
    assert row(found, f"270M {form} beside its own bfloat16, one launch")[1] == verdict
    assert row(found, f"1_1B {form} beside its own bfloat16, one launch")[1] == "not measured"
    text = report.summary(found)
    assert f"{rate / 1500:.2f}x" in text and "| x own bfloat16 |" in text


def test_ops_by_the_worst_case_of_the_best_backend():
    small = op("rms_norm", LARGE // 2, 10, 0.1, case="small")
    slow = op("rms_norm", LARGE, 40, 0.6, backend="cuda")
    units = {"a": small, "b": slow, "c": op("rms_norm", LARGE, 20, 0.9)}
    name = "rms_norm from 64 MiB on, of the peak"
    assert row(results(ops=units), name) == ("90.0%", "reached")
    units["d"] = op("rms_norm", 2 * LARGE, 50, 0.8, case="other")
    assert row(results(ops=units), name) == ("80.0%", "missed")
    copied = {"c": op("rms_norm", LARGE, 20, None)}
    assert row(results(ops=copied), name) == ("50.0%", "missed")


def test_a_copy_that_was_slower_than_the_op_is_no_ceiling():
    slow = op("rms_norm", LARGE, 20, None, of_copy=1.87)
    both = op("rms_norm", 3 * LARGE, 60, None, of_copy=1.87, backward=True)
    found = results(ops={"f": slow, "b": both})
    assert row(found, "rms_norm from 64 MiB on, of the peak") == ("", "not measured")
    assert row(found, "rms_norm's backward from 64 MiB on, of the peak") == ("", "not measured")
    text = report.summary(found)
    assert "| not usable |" in text and "187%" not in text
    times = {"baselines": {}, "copy": {"median": 37.4e-6}}
    assert report._op_panel("rms_norm", slow | times)["ceiling"] is None
    assert report._op_panel("rms_norm", slow | times | {"of_copy": 0.9})["ceiling"] > 0


def test_a_floor_below_what_was_reached_is_not_usable():
    reason = "ceiling not usable: accelerated, graph reached 1.30 times as much"
    unit = decoding(RATES) | {"floor_tokens": 1000.0, "ceiling_missing": reason}
    text = report.summary(results(decode={"u": unit}))
    assert text.count("not usable") == len(RATES) and "130%" not in text
    assert "| 1000 |" not in text, "nor is the floor shown"


def test_the_backward_alone():
    forward = op("rms_norm", LARGE, 25, 0.8)
    both = op("rms_norm", 3 * LARGE, 75, 0.8, backward=True)
    name = "rms_norm's backward from 64 MiB on, of the peak"
    assert row(results(ops={"f": forward, "b": both}), name) == ("80.0%", "reached")
    # Twice the bytes in three times the forward's time: two thirds of its share.
    both = op("rms_norm", 3 * LARGE, 100, 0.6, backward=True)
    assert row(results(ops={"f": forward, "b": both}), name) == ("53.3%", "missed")
    assert row(results(ops={"b": both}), name) == ("", "not measured")


def test_few_rows_tokens_and_the_compiler():
    few = {str(n): op("rms_norm", 100, us, 0.1, rows=n, case=f"rows_{n}")
           for n, us in ((1, 2.0), (4, 2.2), (16, 2.4), (64, 9.0))}  # fmt: skip
    assert row(results(ops=few), "norms of 1 to 16 rows") == ("2.4 us", "reached")
    few["slow"] = op("add_rms_norm", 100, 3, 0.1, rows=4)
    assert row(results(ops=few), "norms of 1 to 16 rows") == ("3 us", "missed")
    compiled = {"a": op("qk_norm_rope", LARGE, 9, 0.82, ratios={"compiled": 1.5})}
    compiled["b"] = op("qk_norm_rope", LARGE, 9, 0.82, ratios={"compiled": 0.97}, backward=True)
    found = results(ops=compiled)
    assert row(found, "qk_norm_rope beside torch.compile") == ("0.97x", "missed")
    assert row(found, "qk_norm_rope from 16384 tokens on, of the peak") == ("82.0%", "reached")
    name = "attention of a token from 64 MiB of keys and values on, of the peak"
    token = op("attention", LARGE + 1, 9, 0.85, rows=0, case="1_1B_token_16x2048")
    assert row(results(ops={"a": token}), name) == ("85.0%", "reached")


def test_the_check_measures_what_the_targets_ask_for(monkeypatch):
    """Names and sizes of what a GPU would run: nothing is run here."""
    pairs = [(op, "triton") for op in op_units.CASES] + [("rms_norm", "cuda")]
    monkeypatch.setattr(op_units, "pairs", lambda device, quick=False: pairs)
    names = [u.name for u in op_units.bench_units(torch.device("cuda"), False)]
    assert len(set(names)) == len(names)
    wanted = [f"rms_norm {m}_rows_16384 bfloat16" for m in ("270M", "450M", "1_1B", "3B")]
    wanted += [f"{op} 1_1B_rows_{n} bfloat16" for op in op_units.NORMS for n in (1, 4, 16)]
    wanted += ["qk_norm_rope 1_1B_rows_16384 bfloat16", "attention 1_1B_token_16x2048 bfloat16"]
    wanted += [f"linear 1_1B_{f}_rows_{n} bfloat16" for f in ("plain", "packed12") for n in (1, 8)]
    assert not [name for name in wanted if f"{name} triton" not in names]
    first = [u.name for u in op_units.parity_units(torch.device("cuda"), False, first=True)]
    assert first == [f"{op} triton" for op in op_units.FIRST]
    check = GpuCheck(device=torch.device("cuda"), seconds=480.0)
    stages = {s.name: [u.name for u in s.units()] for s in check.plan()}
    decode = stages["decode"]
    assert decode[:2] == ["1_1B decode at 128 x 1", "270M decode at 128 x 1"]
    grid = {f"{m} decode at {c} x {b}" for m in ("270M", "1_1B") for c in (128, 1024, 2048)
            for b in (1, 4)}  # fmt: skip
    assert set(decode) == grid
    assert "1_1B decode at 2048 x 64" in stages["models"]
    modes = [
        f"270M {d} {mode}" for d in ("float32", "bfloat16") for mode in ("graph", "one-launch")
    ]
    assert set(modes) | {"270M bfloat16 packed"} <= set(stages["generation"])
    first = [name for case in ("plain", "affine8_64", "affine4_64", "packed12")
             for name in (f"{case}_batch_{b}" for b in (1, 2, 3, 4))]  # fmt: skip
    assert [c.name for c in op_units.in_order("decode_step")][:16] == first


def test_few_models_are_kept_with_their_other_forms(monkeypatch):
    loaded = models.Models(torch.device("cpu"), True)
    half = loaded.get("tiny", torch.bfloat16)
    packed = loaded.compressed("tiny", "packed12")
    loaded.get("tiny", torch.float32)
    assert loaded.get("tiny", torch.bfloat16) is half
    assert loaded.compressed("tiny", "packed12") is packed
    monkeypatch.setattr(models, "KEPT", 1)
    loaded.drop()
    half = loaded.get("tiny", torch.bfloat16)
    packed = loaded.compressed("tiny", "packed12")
    loaded.get("tiny", torch.float32)
    assert loaded.get("tiny", torch.bfloat16) is not half
    assert loaded.compressed("tiny", "packed12") is not packed


def test_a_mode_that_hung_or_failed_is_not_timed():
    units = {"270M float32 one-launch": {"state": "failed", "error": "RuntimeError: odd"}}
    found = results(generation=units)
    loaded = models.Models(torch.device("cpu"), True, results=found)
    assert loaded.missing("one-launch", None) is None, "float32 says nothing of bfloat16"
    units["270M bfloat16 one-launch"] = {"state": "failed", "error": "RuntimeError: wrong"}
    assert "'270M bfloat16 one-launch': RuntimeError: wrong" in loaded.missing("one-launch", None)
    assert loaded.missing("graph", None) is loaded.missing("one-launch", None, trial=True) is None
    units["270M float32 one-launch"]["error"] = "hung: no answer for 75 s"
    assert "hung" in loaded.missing("one-launch", None, trial=True)
