"""The command line, in this process where possible and twice as a user starts it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.commands import TINY, refusal, run_json, start

import elmkernels
from elmkernels import backends
from elmkernels.bench import chart, end_to_end, roofline
from elmkernels.cli.main import main
from elmkernels.surgery import twin
from elmkernels.testing import CASES, model_parity, parity

QUICK = ["--quick", "--checkpoint", str(TINY), "--device", "cpu", "--dtype", "bf16"]
COMPILED = parity.runnable("swiglu", "cpu")


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two cases of each op."""
    for op in CASES:
        monkeypatch.setitem(CASES, op, CASES[op][:2])


@pytest.fixture
def wrong_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compiled swiglu gives 1% too much."""
    if not COMPILED:
        pytest.skip("no compiled CPU backend can run here")
    for name in COMPILED:
        right = backends.kernel("swiglu_fwd", name)
        wrong = lambda x, right=right: right(x) * 1.01  # noqa: E731
        monkeypatch.setitem(backends._KERNELS, ("swiglu_fwd", name), wrong)


def test_info_as_a_user_starts_it():
    process = start("info")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err == ""
    assert elmkernels.__version__ in out
    lines = out.partition("\nbackends\n")[2].splitlines()
    for name, backend in backends.BACKENDS.items():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert (backend.missing or "available") in line


def test_info_json(capsys):
    found = run_json(capsys, "info", "--gemm", "--dtype", "bf16")
    assert found["torch"] == torch.__version__
    assert set(found["backends"]) == set(backends.BACKENDS)
    assert set(found["ops"]) == set(CASES)
    assert found["ops"]["swiglu"]["cpu"] == backends.choose("swiglu", "cpu", None)
    assert set(found["gemm"]) == {"bfloat16"}


def test_options_come_after_the_command(capsys):
    text = refusal(capsys, "--json", "info")
    assert "unrecognized arguments: info" in text and "elmkernels info ..." in text


def test_parity_table(capsys, few_cases):
    argv = ["parity", "attention", "--dtype", "fp32,bf16", "--backend", "sdpa"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "parity: 4 records, 0 failed parity" in out
    assert CASES["attention"][1].name in out
    assert f"rule: {parity.RULE}" in out


def test_parity_json_is_kept_in_a_file(capsys, few_cases, tmp_path):
    argv = ["parity", "attention", "--dtype", "float32", "--backend", "sdpa"]
    found = run_json(capsys, *argv, "--out", str(tmp_path))
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] is True
    assert found["rule"] == parity.RULE
    assert [r["ok"] for r in found["records"]] == [True, True]
    assert {r["dtype"] for r in found["records"]} == {"float32"}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_wrong_kernel_fails_parity(capsys, few_cases, wrong_swiglu):
    assert main(["parity", "swiglu", "--dtype", "fp32"]) == 1
    assert "FAILED: max error" in capsys.readouterr().out


def test_bench_quick(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("elmkernels.bench.ops.QUICK_ROWS", (1,))
    argv = ["bench", "ops", "swiglu" if COMPILED else "attention", "--quick", "--dtype", "bf16"]
    found = run_json(capsys, *argv, "--out", str(tmp_path))
    for record in found["records"]:
        assert record["parity"] is True
        assert record["time"]["median"] > 0
        assert record["baselines"]["reference"]["median"] > 0
    assert found == json.loads((tmp_path / "results.json").read_text())


def test_main_job(capsys, tmp_path):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "parity: ok" in captured.out
    assert "accelerated is" in captured.out
    assert "[1/5] bfloat16: model" in captured.err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] is True
    assert found["config"]["model_dim"] == 256
    assert found["machine"]["torch"] == torch.__version__
    done = found["dtypes"]["bfloat16"]
    compared = {c["what"] for c in done["parity"]["comparisons"]}
    parameters = elmkernels.OpenELM.from_pretrained(TINY).named_parameters()
    assert compared >= {"logits", "token losses"} | {f"grad {name}" for name, _ in parameters}
    assert len(done["speed"]) == 3
    for task in done["speed"]:
        times = task["times"]
        assert task["ratio"]["eager"] == times["eager"]["median"] / times["accelerated"]["median"]
        shares = task["of_ceiling"]
        assert (shares is None) == bool(task["ceiling_missing"])
        assert shares is None or 0 < min(shares.values()) <= max(shares.values()) <= 1
    if chart.missing() is None:
        assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
        assert f"wrote results.json, chart.png to {tmp_path}\n" in captured.err
    else:
        assert f"wrote results.json to {tmp_path}\n" in captured.err


def test_main_job_in_float32_prints_json_alone(capsys):
    found = run_json(capsys, *QUICK[:-1], "fp32", "--backend", "reference")
    done = found["dtypes"]["float32"]
    assert done["parity"]["truth"] == "float64"
    assert done["parity"]["greedy"]["equal"] == done["parity"]["greedy"]["steps"]
    assert set(done["accelerated"]["backends"].values()) == {"reference"}


def test_main_job_finds_a_wrong_kernel(capsys, wrong_swiglu):
    found = run_json(capsys, *QUICK[:-1], "fp32", code=1)
    failed = [c["what"] for c in found["dtypes"]["float32"]["parity"]["comparisons"] if c["reason"]]
    assert {"logits", "logits, cached", "grad norm.weight"} <= set(failed)


def test_without_truth_a_weaker_rule_still_finds_a_wrong_kernel(wrong_swiglu):
    model = elmkernels.OpenELM.from_pretrained(TINY)
    ids = torch.arange(24).view(1, 24)
    plain, accelerated = twin(model), twin(model)
    elmkernels.accelerate(accelerated)
    assert model_parity.check_model(model, plain, ids, 4, truth=False).ok
    found = model_parity.check_model(model, accelerated, ids, 4, truth=False)
    assert found.rule.startswith("weak")
    assert not found.ok


def test_packed_weights_are_proved_too(capsys):
    found = run_json(capsys, *QUICK, "--prepack", "--rounds", "1")
    assert found["prepack"] is True
    assert found["dtypes"]["bfloat16"]["speed"][0]["times"]["eager"]["n"] == 1


def test_a_speed_below_eager_is_shown_as_such():
    def measured(eager: float) -> roofline.Measured:
        times = {
            "eager": roofline.Timing(eager, eager, eager, 3),
            "accelerated": roofline.Timing(2, 2, 2, 3),
        }
        return roofline.Measured("task", 8, times, dict.fromkeys(times), 1.0, 1.0, roofline.MEMORY)

    assert measured(1.5).rows()[0]["accelerated is"] == "0.75x"
    assert "slower than eager: task (0.75x)" in end_to_end.speed_text([measured(1.5)])
    assert "slower" not in end_to_end.speed_text([measured(3.0)])


def test_interrupted_main_job_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "generation", interrupted)
    assert main([*QUICK, "--out", str(tmp_path)]) == 130
    captured = capsys.readouterr()
    assert "prefill 64" in captured.out
    assert "interrupted" in captured.err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] is False
    assert [task["task"] for task in found["dtypes"]["bfloat16"]["speed"]] == ["prefill 64"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_by_a_signal(tmp_path, sent, code):
    process = start("parity", "attention", "--out", str(tmp_path))
    assert "parity attention" in process.stderr.readline()
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert json.loads((tmp_path / "results.json").read_text())["complete"] is False


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
def test_closed_stdout_is_no_traceback():
    process = start("info", "--json")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == ""
    process.stderr.close()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["--frobnicate"], "--frobnicate"),
        (["parity", "gelu"], "rms_norm"),
        (["bench", "ops", "gelu"], "linear_cross_entropy, got 'gelu'"),
        (["bench", "gelu"], "'gelu'"),
        (["bench"], "required: ops|generate|train"),
        (["info", "--dtype", "fp8"], "bf16"),
        (["parity", "--dtype", "fp32,int8"], "'int8'"),
        (["--model", "OpenELM-9B"], "OpenELM-270M"),
        (["info", "--dtype", "bf16"], "--dtype belongs to --gemm"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["parity", "--device", "cpu:3"], "cpu:3"),
        (["--backend", "mps"], "'mps'"),
        (["--backend", "triton", "--device", "cpu"], "triton"),
        (["parity", "swiglu", "--backend", "triton", "--device", "cpu"], "triton"),
        (["parity", "swiglu", "--backend", "reference"], "reference"),
        (["parity", "swiglu", "--backend", "sdpa"], "'sdpa' has no kernels for swiglu"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", str(TINY), "--model", "OpenELM-270M"], "--checkpoint"),
        (["--config", "OpenELM-270M"], "--checkpoint"),
        (["--rounds", "0"], "'0'"),
        (["parity", "attention", "--out", __file__], Path(__file__).name),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line(capsys, argv, named):
    if "triton" in argv and "cpu" in backends.BACKENDS["triton"].devices:
        pytest.skip("Triton is interpreted here")
    assert named in refusal(capsys, *argv)


def test_truncated_checkpoint_is_one_line(capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refusal(capsys, "--checkpoint", str(tmp_path))
