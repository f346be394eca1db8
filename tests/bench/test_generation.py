"""Models side by side: the same tokens of every runner, what the results hold, how they end."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers.reports import CONFIG, LLAMA, SIZES, Recorded, load

from elmkernels import OpenELM, OpenELMConfig
from elmkernels.acceleration import routines, swap
from elmkernels.bench import chart, generation, machine
from elmkernels.bench.baselines import llama_cpp
from elmkernels.bench.benchmark import COMPILED, EAGER, OURS
from elmkernels.bench.generation import Generation
from elmkernels.bench.generation_figures import BEST
from elmkernels.bench.runners import Task, TorchRunner, compress
from elmkernels.cli.main import main

BASELINES = {
    "fp32": {"eager fp32", "ours fp32"},
    "16-bit": {"eager bf16", "ours bf16", "ours packed12"},
    "int8": {"eager bf16", "ours int8"},
    "int4": {"eager bf16", "ours int4"},
}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """One thread, and no timing of routines: on models as small as these both only cost time."""
    monkeypatch.setattr(swap, "measure_plan", lambda dtype, packing=False: routines.Plan())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_llama(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def measured(**options) -> tuple[dict, list[str]]:
    """The results and the printed texts of a benchmark."""
    options = {"load": load, "sizes": SIZES, "compiled": False} | options
    benchmark = Generation(name="tiny", weights="random weights", **options)
    results, report = benchmark.start(), Recorded()
    benchmark.run(results, report)
    absent = any(group["missing"] for group in results["groups"].values())
    count = len(report.stages)
    assert count < benchmark.stages if absent else count == benchmark.stages
    return results, report.texts


def test_drafts_are_measured_beside_their_format(without_llama):
    results, texts = measured(formats=("bf16", "int4"), drafts=("lookup", "self"))
    for group, form in (("16-bit", "bf16"), ("int4", "int4")):
        found = results["groups"][group]
        for draft in ("lookup", "self"):
            name = f"ours {form}, {draft}"
            about = found["runners"][name]
            assert about["agree"] == found["runners"][f"ours {form}"]["agree"]
            said = about["facts"]["speculation"]
            assert set(said) == {task["task"] for task in found["tasks"] if task["steps"]}
            for task in found["tasks"]:
                assert task["runners"][name]["tokens_per_second"]["median"] > 0
                assert "step_bytes" not in task["runners"][name]
                assert name in task["ratios"]
            assert all(s["draft"] == draft and s["passes"] > 0 for s in said.values())
    assert any("guesses kept" in text for text in texts)
    assert json.loads(json.dumps(results)) == results


def test_every_group_has_every_figure(without_llama):
    results, texts = measured()
    assert results["complete"] is True
    assert set(results["groups"]) == set(BASELINES)
    assert results["sizes"]["steps"] == 4 and results["parameters"] == CONFIG.num_parameters
    for name, group in results["groups"].items():
        assert set(group["runners"]) == BASELINES[name]
        ours = {n for n in BASELINES[name] if n.startswith("ours")}
        for runner, about in group["runners"].items():
            assert about["weight_bytes"] > 0 and about["cache_token_bytes"] > 0
            if runner in ours:
                assert about["agree"]["of"] == 4
                assert about["facts"]["first_token_seconds"] > 0
        for type in LLAMA[name]:
            assert "pip install llama-cpp-python" in group["missing"][f"llama.cpp {type}"]
        tasks = {task["task"]: task for task in group["tasks"]}
        assert list(tasks) == ["prefill 12", "decode 4 after 6", "decode 4 after 6, batch 2"]
        assert [task["tokens"] for task in tasks.values()] == [12, 4, 8]
        for task in tasks.values():
            assert task["rounds"] == 2 and task["read_bandwidth"]["median"] > 0
            assert set(task["runners"]) == BASELINES[name]
            assert set(task["ratios"]) == ours
            for figures in task["runners"].values():
                rate = figures["tokens_per_second"]
                assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
                assert len(figures["samples"]) == figures["seconds"]["n"] == 2
                assert figures["ms_per_token"] == pytest.approx(1e3 / rate["median"])
                assert ("of_read_bandwidth" in figures) == bool(task["steps"])
            for mine in ours:
                eager = next(n for n in BASELINES[name] if n.startswith("eager"))
                expected = (
                    task["runners"][mine]["tokens_per_second"]["median"]
                    / task["runners"][eager]["tokens_per_second"]["median"]
                )
                assert task["ratios"][mine] == pytest.approx({eager: expected})
    assert results["groups"]["fp32"]["missing"]["compiled fp32"] == "left out as asked for"
    assert results["groups"]["fp32"]["runners"]["ours fp32"]["agree"]["equal"] == 4
    assert len(texts) == 5 + bool(results["busy"])
    assert "missing llama.cpp Q4_0: llama_cpp is not installed" in texts[-1]
    json.dumps(results, default=str)


def test_formats_choose_the_groups(without_llama):
    results, _ = measured(formats=("packed12", "int4"), sizes=replace(SIZES, batch=1))
    assert list(results["groups"]) == ["16-bit", "int4"]
    assert set(results["groups"]["16-bit"]["runners"]) == {"eager bf16", "ours packed12"}
    assert len(results["groups"]["int4"]["tasks"]) == 2


def test_the_bytes_of_a_step():
    model = load(torch.bfloat16)
    plain = TorchRunner("eager", EAGER, model).weight_bytes
    assert plain == sum(p.nbytes for p in model.parameters())
    sizes = [TorchRunner(f, OURS, compress(f, model)).weight_bytes for f in generation.FORMATS[1:]]
    assert sizes[0] == plain and 0.7 < sizes[1] / plain < 0.9
    assert 0.5 < sizes[2] / plain < 0.6 and 0.25 < sizes[3] / plain < 0.33


def test_rounded_activations_stand_beside_what_they_lose(without_llama):
    results, texts = measured(formats=("bf16", "int8", "int4"), activations="int8")
    assert results["activations"] == "int8"
    for format in ("int8", "int4"):
        about = results["groups"][format]["runners"][f"ours {format}, int8 activations"]
        assert about["facts"]["rounding"]["perplexity"] > 0 and about["agree"]["of"] == 4
        said = next(text for text in texts if f"ours {format}, int8 activations: logits" in text)
        assert "perplexity of its own text" in said and "without rounding" in said
    assert "ours bf16, int8 activations" not in results["groups"]["16-bit"]["runners"]


@pytest.mark.parametrize("load", [0.0, 1e3])
def test_a_busy_machine_is_named(without_llama, monkeypatch, load):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
    results, texts = measured(formats=("fp32",))
    assert results["machine"]["load"] == load
    assert (results["busy"] is not None) == (load > 0)
    assert ("busy: a load of 1000.0" in texts[0]) == (load > 0)


def test_losses_are_printed(without_llama, monkeypatch):
    original = TorchRunner.run

    def slow(self, task):
        run = original(self, task)
        return (lambda: [run() for _ in range(40)][0]) if self.kind == OURS else run

    monkeypatch.setattr(TorchRunner, "run", slow)
    _, texts = measured(formats=("fp32",))
    assert "ours fp32 is slower than eager fp32 (0." in texts[-1]


def test_compiled_chooses_the_same_tokens():
    model = load(torch.float32).eval()
    prompts = torch.randint(256, (1, 6), generator=torch.Generator().manual_seed(0))
    for steps in (0, 6):
        task = Task("any", prompts, steps)
        runners = [TorchRunner("r", kind, model) for kind in (EAGER, COMPILED)]
        expected, got = (runner.run(task)() for runner in runners)
        assert got == expected
        runners[1].end()


def test_what_fails_is_named(without_llama, monkeypatch):
    def broken(self, steps):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(TorchRunner, "_compiled", broken)
    results, _ = measured(formats=("fp32",), compiled=True)
    group = results["groups"]["fp32"]
    assert group["missing"]["compiled fp32, prefill 12"] == "no compiler"
    assert all(set(task["runners"]) == BASELINES["fp32"] for task in group["tasks"])


def test_a_format_that_does_not_fit_is_named(without_llama):
    narrow = OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | {"ffn_dim_divisor": 32})
    results, _ = measured(
        load=lambda dtype: OpenELM.from_config(narrow, seed=3, dtype=dtype),
        formats=("int4",),
        compiled=True,
    )
    group = results["groups"]["int4"]
    if any(width % 64 for width in narrow.ffn_dims):
        assert "no multiple of group_size 64" in group["missing"]["ours int4"]
    assert "eager bf16" in group["runners"]


def test_an_interruption_keeps_what_was_measured(without_llama):
    benchmark = Generation(
        load=load, name="tiny", weights="random weights", sizes=SIZES, compiled=False
    )
    results = benchmark.start()
    report = Recorded(results, stop="16-bit: decode 4 after 6, round 2/2")
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(results, report)
    assert [list(saved["groups"]) for saved in report.saved] == [["fp32"]]
    assert results["complete"] is False
    tasks = results["groups"]["16-bit"]["tasks"]
    assert [task["rounds"] for task in tasks] == [2, 1]
    assert tasks[1]["wanted_rounds"] == 2 and "decode 4 after 6" in report.texts[-1]


@pytest.fixture
def checkpoint(tmp_path) -> str:
    load(torch.float32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def arguments(checkpoint: str) -> list[str]:
    sizes = ["--prefill", "12", "--prompt", "6", "--steps", "4", "--batch", "2", "--rounds", "2"]
    return ["bench", "generate", "--checkpoint", checkpoint, "--quick", "--no-compile", *sizes]


def test_the_command(capsys, tmp_path, checkpoint, without_llama):
    argv = [*arguments(checkpoint), "--formats", "fp32,int8", "--out", str(tmp_path / "out")]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["complete"] is True and list(found["groups"]) == ["fp32", "int8"]
    if chart.missing() is None:
        assert (tmp_path / "out" / "chart.png").read_bytes()[:4] == b"\x89PNG"
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "ours int8 is" in captured.out and "] fp32: preparing ours fp32" in captured.err


def test_an_interrupted_command(capsys, tmp_path, checkpoint, without_llama, monkeypatch):
    original = generation._run_group

    def stop(todo, group, *rest):
        if group.name == "int8":
            raise KeyboardInterrupt
        original(todo, group, *rest)

    monkeypatch.setattr(generation, "_run_group", stop)
    argv = [*arguments(checkpoint), "--formats", "fp32,int8", "--out", str(tmp_path / "out")]
    assert main(argv) == 130
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["complete"] is False and list(found["groups"]) == ["fp32"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "--formats", "int3"],
            "bf16, packed12, int8, int4, got 'int3'",
        ),
        (["generate", "--dtype", "bf16"], "unrecognized arguments: --dtype bf16"),
        (["generate", "--rounds", "0"], "must be a positive integer"),
        (["generate", "--backend", "avx2,avx512"], "got 'avx2,avx512'"),
        (["generate", "--model", "2B"], "--model: must be one of"),
        (["generate", "--prepack"], "unrecognized arguments"),
        (["generate", "--device", "cpu"], "unrecognized arguments: --device cpu"),
        (["generate", "--formats", "int8", "--no-compile"], "--no-compile has no effect"),
        (["generate", "--formats", "bf16", "--activations", "int8"], "--activations has no effect"),
        (["ops", "swiglu", "--steps", "4"], "unrecognized arguments: --steps 4"),
        (["ops", "swiglu", "--rounds", "4"], "unrecognized arguments: --rounds 4"),
        (["ops", "swiglu", "generate"], "op must be one of rms_norm"),
    ],
)
def test_wrong_input(capsys, argv, message):
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_llama_cpp_runs_beside():
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    results, _ = measured()
    for name, group in results["groups"].items():
        assert not [who for who in group["missing"] if who.startswith("llama.cpp")]
        for type in LLAMA[name]:
            about = group["runners"][f"llama.cpp {type}"]
            assert set(about["facts"]["attention"].values()) <= set(llama_cpp.FLASH)
            assert len(about["facts"]["attention"]) == 3
            assert about["agree"]["of"] == 4
        for task in group["tasks"]:
            assert all(BEST in ratios for ratios in task["ratios"].values())
    assert results["groups"]["fp32"]["runners"]["llama.cpp F32"]["agree"]["equal"] == 4


def test_llama_cpp_decodes_a_batch_as_it_decodes_each_row(tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from elmkernels.openelm.gguf import export_gguf

    export_gguf(load(torch.float32), tmp_path / "m.gguf", "f32")
    model = llama_cpp.Model(tmp_path / "m.gguf", CONFIG)
    rows = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0)).tolist()

    def decoded(prompts: list[list[int]], flash: str) -> list[tuple[int, ...]]:
        context = llama_cpp.Context(model, 16, len(prompts), flash)
        for _ in range(2):  # again after going back
            context.truncate(0)
            chosen = [context.prompt(prompts)]
            for _ in range(5):
                chosen.append(context.step(chosen[-1]))
        context.close()
        return list(zip(*chosen, strict=True))

    for flash in llama_cpp.FLASH:
        assert decoded(rows, flash) == [decoded([row], flash)[0] for row in rows]
    model.close()
    with pytest.raises(RuntimeError, match="can't load nothing.gguf"):
        (tmp_path / "nothing.gguf").write_bytes(b"nothing")
        llama_cpp.Model(tmp_path / "nothing.gguf", CONFIG)
