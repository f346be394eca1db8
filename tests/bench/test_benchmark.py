"""The interface of benchmarks, and what every one of them does alike on the command line."""

import argparse
import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.reports import Recorded

from elmkernels import OpenELMConfig
from elmkernels.bench import benchmark, chart, machine
from elmkernels.bench.benchmark import SILENT, Benchmark, Report, Results, Sizes
from elmkernels.bench.end_to_end import EndToEnd, EndToEndSizes
from elmkernels.bench.generation import Generation, GenerationSizes
from elmkernels.bench.table import format_table, markdown, share
from elmkernels.bench.training_step import StepSizes, TrainingStep
from elmkernels.cli.console import carry_out
from elmkernels.gpu_check.check import GpuCheck
from elmkernels.gpu_check.models import GpuCheckSizes

CPU = torch.device("cpu")
CONFIG = OpenELMConfig.from_name("OpenELM-270M")
MODEL = {"load": lambda dtype: None, "name": "any", "weights": "none"}
BENCHMARKS = {
    "check": EndToEnd(**MODEL, dtypes=(torch.float32,), device=CPU, sizes=EndToEndSizes()),
    "generation": Generation(**MODEL),
    "training step": TrainingStep(config=CONFIG),
    "gpu check": GpuCheck(device=CPU, seconds=60.0, quick=True),
}
PLACES = {"check": "dtypes", "generation": "groups", "training step": "precisions",
          "gpu check": "stages"}  # fmt: skip


@dataclass(frozen=True)
class Counting(Benchmark):
    """Three parts, the last of which may fail or be interrupted."""

    fails: bool = False
    stop: BaseException | None = None
    after: Callable[[], None] = lambda: None

    @property
    def stages(self) -> int:
        return 3

    def describe(self) -> Results:
        return {"parts": []}

    def measure(self, results: Results, report: Report) -> None:
        for part in range(3):
            report.stage(f"part {part}")
            if part == 2 and self.stop is not None:
                raise self.stop
            results["parts"].append(part)
            report.print(f"measured {part}")
            report.save()
            self.after()

    def passed(self, results: Results) -> bool:
        return not self.fails

    def chart(self, results: Results, folder: Path) -> list[str]:
        (folder / "parts.png").write_text(str(results["parts"]))
        return ["parts.png"]


def arguments(out: Path | None, json: bool = False) -> argparse.Namespace:
    return argparse.Namespace(out=None if out is None else str(out), json=json, command="counting")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_starts_with_nothing_measured(name, monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    todo = BENCHMARKS[name]
    found = todo.start()
    assert found["complete"] is False and found[PLACES[name]] == {}
    assert found["busy"].startswith("busy: a load of 1000.0")
    assert json.dumps(found) and todo.stages > 0
    assert todo.passed(found), "nothing was measured, so nothing failed"


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("load", [0.0, 1e3])
def test_a_busy_machine_is_shown_before_any_figure(name, load, monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0.0, 0.0))
    todo, report = BENCHMARKS[name], Recorded()
    monkeypatch.setattr(type(todo), "measure", lambda self, results, report: None)
    results = todo.start()
    todo.run(results, report)
    assert [text[:20] for text in report.texts] == (["busy: a load of 1000"] if load else [])
    assert results["complete"] is True


def test_the_report_of_a_gpu_check_names_a_busy_machine(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    check = BENCHMARKS["gpu check"]
    results = check.start()
    assert f"**{results['busy']}**" in check.summary(results)
    assert "busy" not in check.summary(results | {"busy": None})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_nothing_is_drawn_of_nothing(name, tmp_path):
    pytest.importorskip("matplotlib")
    todo = BENCHMARKS[name]
    assert todo.chart(todo.start(), tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [EndToEndSizes, GenerationSizes, StepSizes, GpuCheckSizes])
def test_sizes(sizes):
    usual, quick = sizes(), sizes.quick()
    assert type(quick) is sizes and quick.rounds < usual.rounds
    assert sizes.chosen(False, {"rounds": None}) == usual
    assert sizes.chosen(True, {"rounds": 9}) == replace(quick, rounds=9)
    with pytest.raises(TypeError, match="unexpected"):
        sizes.chosen(False, {"tasks": 1})


def test_sizes_within_a_model():
    short = OpenELMConfig.from_name("OpenELM-270M", rope_max_length=40)
    found = EndToEndSizes(rounds=3).within(short)
    assert (found.prompt, found.generated, found.prefill, found.rounds) == (20, 20, 40, 3)
    found = GenerationSizes(probe=8).within(short)
    assert (found.prompt, found.steps, found.agree, found.probe) == (20, 20, 21, 8)


def test_a_benchmark_needs_all_of_the_interface():
    class Half(Benchmark):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()
    with pytest.raises(NotImplementedError):
        Sizes.quick()
    assert SILENT.stage("any") is SILENT.print("any") is SILENT.save() is None


def test_a_benchmark_as_a_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(chart, "missing", lambda: None)
    assert carry_out(arguments(tmp_path), Counting()) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] is True and found["parts"] == [0, 1, 2] and found["elmkernels"]
    captured = capsys.readouterr()
    assert captured.out.endswith("measured 0\nmeasured 1\nmeasured 2\n")
    assert "[3/3] part 2" in captured.err
    assert captured.err.endswith(f"wrote results.json, parts.png to {tmp_path}\n")
    assert (tmp_path / "parts.png").read_text() == "[0, 1, 2]"


def test_json_is_all_that_is_printed(capsys):
    assert carry_out(arguments(None, json=True), Counting()) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == [0, 1, 2]


def test_a_failure_is_the_exit_code():
    assert carry_out(arguments(None), Counting(fails=True)) == 1


def test_results_are_kept_while_they_come(tmp_path):
    counts = []

    def after() -> None:
        counts.append(len(json.loads((tmp_path / "results.json").read_text())["parts"]))

    assert carry_out(arguments(tmp_path), Counting(after=after)) == 0
    assert counts == [1, 2, 3]


@pytest.mark.parametrize("out", [True, False])
def test_an_interruption_keeps_what_was_measured(out, capsys, tmp_path):
    stopped = Counting(stop=KeyboardInterrupt())
    assert carry_out(arguments(tmp_path if out else None), stopped) == 130
    captured = capsys.readouterr()
    assert "measured 1" in captured.out and "interrupted" in captured.err
    if out:
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["complete"] is False and found["parts"] == [0, 1]
    else:
        assert "--out keeps it in a file" in captured.err


def test_a_run_that_did_not_complete_is_a_failure():
    assert carry_out(arguments(None), Counting(), run=lambda results, report: None) == 1


def test_earlier_results_are_gone_on_from(tmp_path):
    assert carry_out(arguments(tmp_path), Counting(), {"parts": [7]}) == 0
    assert json.loads((tmp_path / "results.json").read_text())["parts"] == [7, 0, 1, 2]


def test_names_stand_in_one_place():
    """What is measured side by side is named by constants of the interface."""
    names = {benchmark.EAGER, benchmark.ACCELERATED, benchmark.COMPILED, benchmark.OURS}
    package = Path(benchmark.__file__).parents[1]
    found = set()
    for path in package.rglob("*.py"):
        values = [n.value for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign)]
        values = [x for v in values for x in (v.elts if isinstance(v, ast.Tuple) else [v])]
        values = {v.value for v in values if isinstance(v, ast.Constant)}
        if values & names:
            found.add(path.relative_to(package).as_posix())
    assert found == {"bench/benchmark.py"}
    assert names < set(chart.COLORS)


@pytest.mark.parametrize(
    ("part", "text"), [(0.256, "26%"), (1.0, "100%"), (1.87, "not usable"), (None, "not usable")]
)
def test_a_share_of_a_ceiling(part, text):
    assert share(part) == text


def test_tables():
    rows = [{"name": "a|b", "us": 1.5, "none": None}, {"name": "c", "us": 20000.0, "none": ""}]
    assert format_table(rows).splitlines()[0].split() == ["name", "us", "none"]
    assert markdown(rows).splitlines() == [
        "| name | us |", "| --- | --- |", "| a/b | 1.5 |", "| c | 2.00e+04 |"
    ]  # fmt: skip
