"""`elmkernels gpu-check` as its rehearsal on a CPU: every stage once, and how it ends early."""

import json
from pathlib import Path

import pytest
import torch

from elmkernels.bench import chart, roofline
from elmkernels.cli.main import main
from elmkernels.gpu_check import (
    check,
    generation_units,
    model_units,
    models,
    op_units,
    report,
    runners,
    targets,
)
from elmkernels.gpu_check.stages import Clock
from elmkernels.testing import CASES
from elmkernels.testing.parity import runnable

COMPARED = models.GpuCheckSizes.quick().compared  # tokens
COMPILED = runnable("decode_step", "cpu")
QUICK = ["gpu-check", "--device", "cpu", "--quick", "--out"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def few_cases():
    """The first two cases of each op, which are all that its share of a minute is for."""
    with pytest.MonkeyPatch.context() as patch:
        for op in CASES:
            patch.setitem(CASES, op, CASES[op][:2])
        yield


def found_in(folder: Path) -> dict:
    assert not list(folder.glob(".*"))
    return json.loads((folder / "results.json").read_text())


def states(found: dict, stage: str) -> dict[str, str]:
    return {name: u["state"] for name, u in found["stages"][stage]["units"].items()}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[int, dict, str]:
    """The exit code, results.json and summary.md of one whole run."""
    folder = tmp_path_factory.mktemp("gpu-check")
    # Far more time than it takes, so that nothing is left out on a slow machine.
    code = main([*QUICK, str(folder), "--minutes", "20"])
    if chart.missing() is None:
        for name in ("models.png", "ops.png"):
            assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    return code, found_in(folder), (folder / "summary.md").read_text()


def test_every_stage_runs_to_its_end(rehearsal):
    code, found, summary = rehearsal
    failed = [
        f"{stage}: {name}: {u.get('error')}"
        for stage, entry in found["stages"].items()
        for name, u in entry["units"].items()
        if u["state"] != "done" or u.get("ok") is False
    ]
    assert not failed and code == 0 and found["complete"] is True
    assert list(found["stages"]) == list(check.STAGES)
    assert not any(stage["left_out"] for stage in found["stages"].values())
    for title in ("Stages", "Targets", "Parity", "Generation", "Ops", "Models"):
        assert f"\n## {title}\n" in summary
    assert "a rehearsal, no figure of a GPU" in summary
    assert "Stopped early" not in summary and "FAILED" not in summary
    assert summary.count("| not measured |") == len(targets.TARGETS), "no figure of a CPU's"


def test_the_machine_and_what_is_missing(rehearsal):
    facts = rehearsal[1]["stages"]["machine"]["units"]["facts"]
    assert facts["torch"] == torch.__version__ and set(facts["ops"]) == set(CASES)
    assert facts["backends"]["reference"] is None
    assert "runs on" in facts["backends"]["cuda"] or "device" in facts["backends"]["cuda"]


def test_every_op_has_its_parity(rehearsal):
    stages = rehearsal[1]["stages"]
    first, others = (stages[name]["units"] for name in ("parity", "other-parity"))
    ops = list(dict.fromkeys(u["op"] for u in first.values()))
    usable = {op for op, _ in op_units.pairs(torch.device("cpu"))}
    assert ops == [op for op in op_units.FIRST if op in usable]
    units = first | others
    assert {u["op"] for u in units.values()} == usable
    for u in units.values():
        assert sum(d["run"] for d in u["dtypes"].values()) == u["run"] == u["wanted"]
        assert 0 < max(d["worst"] for d in u["dtypes"].values()) <= 1
    watched = rehearsal[1]["stages"]["sanitizer"]["units"]["memcheck"]
    assert watched["tool"].startswith("absent") and watched["cases"][0].endswith("ok")


def test_tokens_of_the_step_that_a_gpu_captures(rehearsal):
    units = rehearsal[1]["stages"]["generation"]["units"]
    for dtype in ("float32", "bfloat16"):
        graph = units[f"tiny {dtype} graph"]
        assert graph["ok"] and graph["captured"] is False
    assert units["tiny float32 graph"]["tokens"]["equal"] == COMPARED


@pytest.mark.skipif(not COMPILED, reason="no compiled CPU backend can run here")
def test_tokens_of_one_launch_and_the_bits_of_packed_weights(rehearsal):
    units = rehearsal[1]["stages"]["generation"]["units"]
    assert units["tiny float32 one-launch"]["tokens"]["equal"] == COMPARED
    packed = units["tiny bfloat16 packed"]
    assert packed["equal"] == packed["steps"] == generation_units.EXACT_STEPS
    decode = rehearsal[1]["stages"]["decode"]["units"]["tiny decode at 260 x 1"]
    one_launch = {"accelerated, one launch", *runners.OTHER_FORMS.values()}
    assert one_launch <= set(decode["times"]) and decode["missing"] == {}
    assert set(decode["agree"]) & one_launch == one_launch - set(runners.QUANTIZED)


def test_models_beside_their_baselines(rehearsal):
    stages = rehearsal[1]["stages"]
    decode = stages["decode"]["units"]["tiny decode at 260 x 2"]
    ours = {"accelerated", "accelerated, graph", "accelerated, graph, sdpa"}
    assert set(decode["times"]) >= {"eager", "torch baseline"} | ours
    assert (decode["batch"], decode["context"], decode["steps"]) == (2, 260, 4)
    for name, rate in decode["tokens_per_second"].items():
        assert rate == pytest.approx(8 / decode["times"][name]["median"])
    assert decode["floor_tokens"] == pytest.approx(8 / decode["floor"])
    assert decode["datasheet_tokens"] is None
    assert all(0 <= n <= decode["tokens_each"] for n in decode["agree"].values())
    step = stages["models"]["units"]["tiny training step 16"]
    assert set(step["times"]) == {"eager", "accelerated"}
    baselines = next(iter(stages["compiled"]["units"].values()))
    named = set(baselines["times"]) | set(baselines["missing"])
    assert named >= {"compiled", "OLMo-1B eager", "OLMo-1B compiled", "accelerated"}
    assert "compiled" in baselines["times"]


def test_a_failing_op_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    right = op_units.check_parity

    def wrong(op, *args):
        if op == "rms_norm":
            raise RuntimeError("injected\nsecond line")
        return right(op, *args)

    monkeypatch.setattr(op_units, "check_parity", wrong)
    assert main([*QUICK, str(tmp_path), "--stages", "machine,other-parity"]) == 1
    units = found_in(tmp_path)["stages"]["other-parity"]["units"]
    failing = {name for name, u in units.items() if u["state"] == "failed"}
    assert failing == {name for name in units if name.startswith("rms_norm")} != set()
    assert all(units[n]["error"] == "RuntimeError: 3 of 3 cases raised" for n in failing)
    assert all(len(units[n]["raised"]) == 3 for n in failing)
    assert all(u["ok"] for n, u in units.items() if n not in failing)
    assert "other-parity, rms_norm" in capsys.readouterr().out


def test_interrupted_then_continued(tmp_path, monkeypatch, capsys):
    stages = ["--stages", "machine,generation"]

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation_units, "check_model", interrupted)
        assert main([*QUICK, str(tmp_path), *stages]) == 130
    first = found_in(tmp_path)
    assert first["complete"] is False
    assert states(first, "generation") == {"tiny float32": "interrupted"}
    assert first["stages"]["generation"]["units"]["tiny float32"]["ok"] is False
    assert "Stopped early" in (tmp_path / "summary.md").read_text()
    assert "interrupted" in capsys.readouterr().err
    assert main([*QUICK, str(tmp_path), *stages, "--continue"]) == 0
    second = found_in(tmp_path)
    assert second["complete"] is True
    assert second["stages"]["machine"]["units"] == first["stages"]["machine"]["units"]
    assert set(states(second, "generation").values()) == {"done"}


def test_without_time_everything_is_named_as_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "Clock", lambda seconds: Clock(0.0))
    assert main([*QUICK, str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found == found_in(tmp_path) and found["complete"] is True
    for stage in found["stages"].values():
        assert stage["units"] == {} and set(stage["left_out"].values()) == {
            "no time: the stage had 0 s"
        }
    assert "## Left out" in (tmp_path / "summary.md").read_text()


def test_a_dead_device_is_left_to_another_process(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(generation_units, "check_model", broken)
    monkeypatch.setattr(check.gpu_facts, "lives", lambda device: False)
    assert main([*QUICK, str(tmp_path), "--stages", "generation"]) == 1
    found = found_in(tmp_path)
    after = states(found, "generation")
    assert after.pop("tiny float32") == "failed" and set(after.values()) == {"done"}
    assert found["complete"] is True
    assert "another one goes on" in capsys.readouterr().err


NO_GPU = "" if torch.cuda.is_available() else "sees no CUDA device"


def refusal(capsys, *argv: str) -> str:
    assert main(["gpu-check", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--device", "cpu", "--quick"], "--out"),
        (["--device", "cpu", "--out", "{}"], "--quick"),
        (["--device", "cpu", "--quick", "--out", "{}", "--minutes", "0"], "'0'"),
        (["--device", "cpu", "--quick", "--out", "{}", "--stages", "all"], "machine"),
        (["--device", "cpu", "--quick", "--out", "{}", "--dtype", "bf16"], "--dtype"),
        (["--device", "cpu", "--quick", "--out", "{}", "--continue"], "results.json"),
        (["--device", "cuda:99", "--out", "{}"], NO_GPU or "cuda:99"),
        (["--device", "cpu", "--quick", "--out", __file__], Path(__file__).name),
    ],
    ids=lambda x: " ".join(x[2:]) if isinstance(x, list) else "",
)
def test_wrong_options_are_one_line(capsys, tmp_path, argv, named):
    assert named in refusal(capsys, *(a.format(tmp_path) for a in argv))


def test_going_on_with_another_run_s_results_is_refused(capsys, tmp_path):
    earlier = {"command": "gpu-check", "device": "cuda:0", "quick": False, "stages": {}}
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    argv = ["--device", "cpu", "--quick", "--continue", "--out", str(tmp_path)]
    assert "is of device 'cuda:0', this run of 'cpu'" in refusal(capsys, *argv)


@pytest.mark.parametrize("stages", [None, [], {"machine": 5}])
def test_going_on_with_results_of_nobody_is_refused(capsys, tmp_path, stages):
    earlier = {"command": "gpu-check", "device": "cpu", "quick": True, "stages": stages}
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    argv = ["--device", "cpu", "--quick", "--continue", "--out", str(tmp_path)]
    assert "must have an object of stages" in refusal(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", ["--json", "--quick", "--device=cuda"])
def test_no_gpu_is_one_line_with_the_rehearsal(capsys, tmp_path, more):
    text = refusal(capsys, "--out", str(tmp_path), more)
    assert torch.__version__ in text and "compute capability 8.0" in text
    assert "--device cpu --quick" in text
    assert not list(tmp_path.iterdir())


def test_too_little_memory_and_too_old_a_gpu_are_left_out(monkeypatch):
    loaded = models.Models(torch.device("cpu"), quick=True)
    monkeypatch.setattr(models, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(models.LeftOut, match=r"weights need 0\.3 GiB, 0\.0 are free"):
        loaded.get("tiny", torch.bfloat16)
    monkeypatch.setattr(models, "capability", lambda device: (7, 5))
    with pytest.raises(models.LeftOut, match=r"needs compute capability 8\.0"):
        loaded.get("tiny", torch.bfloat16)


def test_a_task_beyond_the_positions_is_left_out():
    loaded = models.Models(torch.device("cpu"), quick=True)
    with pytest.raises(models.LeftOut, match="512 positions, 515 needed"):
        model_units._task(loaded, loaded.config("tiny"), model_units.Shape(1, 510, 4))


def test_floors_by_the_datasheet(monkeypatch):
    monkeypatch.setattr(model_units, "gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    timing = roofline.Timing(1.0, 1.0, 1.0, 3)
    times = {"eager": timing, "accelerated": timing}
    for bound, rate in (
        (roofline.MEMORY, 3.35e12),
        (roofline.PRODUCTS, 989e12),
    ):
        measured = roofline.Measured("t", 10, times, {}, 2.0 * rate, rate / 4, bound)
        found = model_units.floors(measured, torch.device("cuda"))
        assert found == {"floor_tokens": 10 / 8, "datasheet_tokens": 5.0}


def test_losses_are_named_beside_the_wins():
    times = {"median": 1e-6, "p20": 1e-6, "p80": 1e-6, "n": 3}
    op = {"state": "done", "op": "swiglu", "case": "c", "dtype": "bfloat16", "backend": "triton"}
    op |= {"backward": False, "time": times, "bandwidth": 1e12, "of_copy": 0.8, "parity": True}
    op |= {"of_datasheet": 0.3, "of_datasheet_flops": None, "calls": {}}
    op["ratios"] = {"eager": 2.0, "liger": 0.9}
    model = {"state": "done", "model": "1_1B", "missing": {"compiled": "no time left"}}
    model |= {"tokens_per_second": {"eager": 10.0, "accelerated": 20.0, "accelerated, graph": 80.0}}
    model["tokens_per_second"]["compiled"] = 100.0
    model |= {"times": {}, "floor_tokens": 160.0, "datasheet_tokens": 200.0, "tokens_each": 5}
    stage = {"seconds": 1.0, "left_out": {}}
    found = {"complete": True, "stages": {"ops": stage | {"units": {"swiglu c": op}}}}
    found["stages"]["models"] = stage | {"units": {"1_1B decode": model}}
    facts = {"state": "done", "gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13", "cuda": "13.0"}
    facts |= {"capability": "9.0", "memory": {"total": 80 << 30}, "built_for": ["80", "90"]}
    facts["backends"] = {"triton": None, "avx2": "runs on cpu"}
    found["stages"]["machine"] = stage | {"units": {"facts": facts}}
    text = report.summary(found)
    assert "On NVIDIA H100 80GB HBM3; torch 2.13" in text and "rehearsal" not in text
    assert "Compute capability 9.0, 80 GiB, CUDA 13.0; the CUDA library is built for 80, 90" in text
    assert "- avx2: runs on cpu" in text and "- triton" not in text
    assert "- swiglu c: liger 0.90x" in text and "eager 2.00x" not in text
    assert "- 1_1B decode: compiled, accelerated, graph is 0.80x" in text
    assert "| 1_1B decode | eager | 10 | 8.00x | 6% | 160 | 200 |" in text
    assert "- 1_1B decode: compiled: no time left" in text
