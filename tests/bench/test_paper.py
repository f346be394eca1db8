"""The paper's comparison: the naive model is the model, every runner has its figures, and what is
missing is named.
"""

import json
import sys

import pytest
import torch
from helpers.commands import TINY, refusal, run_json
from helpers.reports import CONFIG, Recorded, load

from elmkernels import OpenELM, OpenELMConfig
from elmkernels.acceleration import routines, swap
from elmkernels.bench import chart, paper
from elmkernels.bench.baselines import peers
from elmkernels.bench.baselines.naive import Naive, NaiveRunner
from elmkernels.bench.benchmark import COMPILED, EAGER, OURS
from elmkernels.bench.paper import Paper, PaperSizes
from elmkernels.bench.runners import Runner
from elmkernels.generation.step import greedy
from elmkernels.testing.parity import compare

SIZES = PaperSizes(prompt=6, steps=4, rounds=2, agree=4)
OWN = ("naive", "fused", "accelerated", "packed12", "int4")
NAMES = ["naive", "torch's fused operations", "accelerated", "accelerated, packed12",
         "accelerated, int4"]  # fmt: skip


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """One thread, and no timing of routines."""
    monkeypatch.setattr(swap, "measure_plan", lambda dtype, packing=False: routines.Plan())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(**options) -> tuple[dict, Recorded, Paper]:
    options = {"load": load, "sizes": SIZES} | options
    benchmark = Paper(name="tiny", weights="random weights", **options)
    results, report = benchmark.start(), Recorded()
    benchmark.run(results, report)
    return results, report, benchmark


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_naive_model_is_the_model(dtype):
    """A prompt and steps after it, by the project's rule."""
    model = OpenELM.from_config(CONFIG, seed=1, dtype=dtype)
    wide = OpenELM.from_config(CONFIG, seed=1, dtype=dtype).double()
    ids = torch.randint(CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    cache: list = []
    with torch.inference_mode():
        got = torch.cat([Naive(model)(part, cache) for part in ids.split((5, 1, 3), dim=1)], dim=1)
        found = compare(wide(ids), model(ids), got, "logits")
    assert found.ok, found.reason
    assert [k.shape[2] for k, _ in cache] == [9, 9]
    runner = NaiveRunner("naive", model)
    tasks = paper._tasks(0, SIZES, CONFIG)
    for task in tasks.values():
        chosen = runner.run(task)()
    assert chosen == runner.run(task)() == [*greedy(model, task.prompts, 5).tolist()]


def test_another_shape_than_the_released_ones_is_refused():
    config = OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | {"ffn_with_glu": False})
    with pytest.raises(ValueError, match="model must have QK norms and a gated feed-forward"):
        Naive(OpenELM(config))


def test_every_runner_has_every_figure(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    results, report, benchmark = measured()
    assert results["complete"] is True and list(results["runners"]) == NAMES
    absent = [f"{shape}, {how}" for shape in benchmark.peers for how in ("eager", "compiled")]
    assert list(results["missing"]) == absent and len(absent) == 4
    assert all("pip install transformers" in why for why in results["missing"].values())
    for name, found in results["runners"].items():
        rates, seconds = found["tokens_per_second"], found["seconds"]
        assert list(rates) == ["prompt", "generation", "total"]
        for part, tokens in (("prompt", 6), ("generation", 4), ("total", 10)):
            assert rates[part] == pytest.approx(tokens / seconds[part]["median"])
            assert len(found["samples"][part]) == seconds[part]["n"] == 2
        sums = [a + b for a, b in zip(found["samples"]["prompt"], found["samples"]["generation"],
                                      strict=True)]  # fmt: skip
        assert found["samples"]["total"] == sums
        assert found["agree"]["of"] == 4
        if name in NAMES[:1]:
            assert found["agree"]["equal"] == 4
    lines = report.texts[-1].splitlines()
    assert "a prompt of 6, then 4 tokens" in lines[1]
    assert [line for line in lines if "OpenELM, naive" in line and "1.00 / 1.00 / 1.00" in line]
    assert sum(line.startswith("missing ") for line in lines) == 4
    assert len(report.stages) == benchmark.stages - 4  # nothing missing is warmed up
    assert report.saved
    json.dumps(results, default=str)


class Fake(Runner):
    """A runner of a compiler that fails, or of a library that chooses other tokens."""

    def __init__(self, name: str, kind: str, fails: bool) -> None:
        self.name, self.kind, self.fails, self.weight_bytes = name, kind, fails, 1

    def run(self, task):
        if self.fails:
            raise AssertionError("no graph")
        return lambda: [[0] * (task.steps + 1)]


def test_a_baseline_that_fails_is_missing_and_one_of_ours_is_an_error(monkeypatch):
    made = lambda self, shape: iter(  # noqa: E731
        [(f"{shape}, eager", lambda: Fake("e", EAGER, False)),
         (f"{shape}, compiled", lambda: Fake("c", COMPILED, True))]
    )  # fmt: skip
    monkeypatch.setattr(Paper, "_of_peer", made)
    results, _, _ = measured(choices=("naive", "olmo"))
    assert results["missing"] == {"OLMo-1.2B, compiled": "no graph"}
    assert list(results["runners"]) == ["naive", "OLMo-1.2B, eager"]
    assert results["runners"]["OLMo-1.2B, eager"]["agree"] is None
    assert [row["model"] for row in paper.rows(results)] == ["OpenELM, naive", "OLMo-1.2B, eager"]
    monkeypatch.setattr(Paper, "_ours", lambda self, name, *_: Fake(name, OURS, True))
    with pytest.raises(AssertionError, match="no graph"):
        measured(choices=("accelerated",))


def test_sizes_stay_within_the_model():
    sizes = PaperSizes(prompt=512, steps=512).within(CONFIG)
    assert sizes.prompt + sizes.steps < CONFIG.rope_max_length and sizes.steps > 0
    assert PaperSizes.chosen(True, {"steps": 7, "prompt": None}) == PaperSizes(16, 7, 2, 4)


def test_peers_by_transformers():
    pytest.importorskip("transformers")
    tasks = paper._tasks(0, SIZES, CONFIG).values()
    for shape in peers.SHAPES:
        model = peers.build(shape, torch.bfloat16, torch.device("cpu"), tiny=True)
        runner = peers.PeerRunner(shape, model, None)
        for task in tasks:
            run = runner.run(task)
            first = run()
            assert len(first[0]) == (task.steps + 1 if task.steps else 1) and run() == first
    full = peers.SHAPES[peers.OLMO][1]
    assert (full["hidden_size"], full["num_hidden_layers"]) == (2048, 16)


def test_the_command(capsys, tmp_path):
    command = ["bench", "paper", "--quick", "--checkpoint", str(TINY), "--rounds", "1"]
    found = run_json(capsys, *command, "--models", "naive,accelerated", "--out", str(tmp_path))
    assert found["complete"] and list(found["runners"]) == ["naive", "accelerated"]
    assert json.loads((tmp_path / "results.json").read_text())["command"] == "bench paper"
    assert (tmp_path / "chart.png").exists() == (chart.missing() is None)
    text = "--no-compile has no effect: nothing is compiled beside naive"
    assert text in refusal(capsys, *command, "--models", "naive", "--no-compile")
