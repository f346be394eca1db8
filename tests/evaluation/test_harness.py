"""lm-eval on our model: the figures of its own HFLM on transformers' class without kernels."""

import json
import shutil

import pytest
import torch
from helpers.commands import refusal
from helpers.harness_tasks import TASKS, write_checkpoint, write_tasks

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import elmkernels
import elmkernels.hf  # noqa: F401
from elmkernels.cli.main import main
from elmkernels.evaluation import harness, suites
from elmkernels.evaluation.lm import OpenELMLM
from elmkernels.evaluation.store import Store, checkpoint_fingerprint

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def theirs(checkpoint, kernels=None) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, kernels=kernels)
    file = str(checkpoint / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **SPECIAL)
    return HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=2)


def instances(tasks, name: str, examples: int) -> tuple[str, list[Instance]]:
    _, chosen = suites.find(name, examples)
    (task,) = harness.load_tasks(chosen, tasks)["tasks"].values()
    with harness._quiet():
        task.build_all_requests(rank=0, world_size=1)
    return task.instances[0].request_type, task.instances


@pytest.mark.parametrize("examples", [0, 2])
@pytest.mark.parametrize("name", TASKS)
def test_every_request_gives_what_hflm_gives(checkpoint, tasks, name, examples):
    kind, requests = instances(tasks, name, examples)
    expected = getattr(theirs(checkpoint), kind)(requests, disable_tqdm=True)
    got = getattr(OpenELMLM(checkpoint), kind)(requests)
    assert len(got) == len(expected) == len(requests) > 5
    for a, b in zip(got, expected, strict=True):
        if kind == "generate_until":
            assert a == b
        elif kind == "loglikelihood_rolling":
            assert a == pytest.approx(b, rel=1e-5)
        else:
            assert a[0] == pytest.approx(b[0], abs=1e-3, rel=1e-5) and a[1] == b[1]


def figures(lm, tasks) -> list[dict]:
    _, chosen = suites.find(",".join(TASKS), 1)
    found = harness.run(lm, chosen, harness.load_tasks(chosen, tasks))["tasks"]
    return [{name: row[name] for name in ("metric", "questions", "metrics")} for row in found]


@pytest.mark.parametrize("kernels", [None, "auto"])
def test_figures_are_those_of_hflm_with_and_without_kernels(checkpoint, tasks, kernels):
    ours = figures(OpenELMLM(checkpoint), tasks)
    for a, b in zip(ours, figures(theirs(checkpoint, kernels), tasks), strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4)
        assert (a["metric"], a["questions"]) == (b["metric"], b["questions"])


GROUP = """group: both
task:
  - choices
  - letters
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def test_a_group_has_the_figure_of_its_tasks(checkpoint, tmp_path):
    own = write_tasks(tmp_path / "own", 5)
    (own / "both.yaml").write_text(GROUP)
    lm = OpenELMLM(checkpoint)

    def rows(names: str) -> list[dict]:
        _, chosen = suites.find(names)
        return harness.run(lm, chosen, harness.load_tasks(chosen, own))["tasks"]

    (both,), each = rows("both"), rows("choices,letters")
    (own / "empty.yaml").write_text("group: empty\ntask:\n  - choices\n")
    with pytest.raises(ValueError, match="empty is a group without a figure of its own"):
        rows("empty")
    assert both["metric"] == "acc" and both["questions"] == 10
    assert both["value"] == pytest.approx(sum(row["metrics"]["acc"] for row in each) / 2)


def test_a_suite_stands_beside_its_figures(checkpoint, tasks, monkeypatch):
    """As if Apple had published figures of these tasks for a model of this shape."""
    own = {
        "suites": {
            "openllm": [
                {"label": "One", "task": "choices", "examples": 2, "metric": "acc"},
                {"label": "Two", "task": "letters", "examples": 0, "metric": "acc_norm"},
            ]
        },
        "figures": {"openllm": {"OpenELM-270M": [25.5, 50.0, 37.75]}},
    }
    monkeypatch.setattr(suites, "_published", lambda: own)
    suite, chosen = suites.find("openllm")
    loaded = harness.load_tasks(chosen, tasks)
    lm = OpenELMLM(checkpoint)
    found = harness.run(lm, chosen, loaded, suite=suite, published="OpenELM-270M")
    one, two = found["tasks"]
    assert (one["examples"], two["examples"]) == (2, 0)
    assert one["published"] == 25.5 and one["difference"] == one["value"] - 25.5
    assert two["metric"] == "acc_norm" and two["label"] == "Two"
    assert found["average"] == (one["value"] + two["value"]) / 2
    assert found["average_difference"] == found["average"] - 37.75


def test_lm_eval_finds_the_model_by_its_name(checkpoint, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with harness._quiet():
        found = lm_eval.simple_evaluate(
            model="elmkernels", model_args=f"pretrained={checkpoint},dtype=float32",
            tasks=["choices"], task_manager=manager, bootstrap_iters=0,
        )  # fmt: skip
    assert 0 <= found["results"]["choices"]["acc,none"] <= 1


def test_every_sort_of_context(checkpoint):
    """Blanks at the end, none at all, one that must be cut, and a beginning token in the text. HFLM
    is asked one at a time: together, it mistakes two splits of the same ids for one another.
    """
    pairs = [
        ("a cat ", "sat"), ("a cat", " sat"), ("", "the mat"), ("  ", "the mat"), ("<s>a", " dog"),
        ("the cat sat " * 60, "on the mat"), ("a", " " + "mat " * 20), ("", "<s>a dog"),
    ]  # fmt: skip
    requests = [
        Instance("loglikelihood", {}, pair, i, metadata=("own", i, 1))
        for i, pair in enumerate(pairs)
    ]
    reference = theirs(checkpoint)
    expected = [reference.loglikelihood([r], disable_tqdm=True)[0] for r in requests]
    got = OpenELMLM(checkpoint).loglikelihood(requests)
    for a, b in zip(got, expected, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == b[1]


def test_a_loaded_model_and_arguments(checkpoint):
    model = elmkernels.OpenELM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="tokenizer must be given with a model"):
        OpenELMLM(model)
    lm = OpenELMLM(model, checkpoint, max_length=40, batch_size=7)
    assert lm.openelm is model and lm.max_length == 40 and lm.prefix_token_id == 1
    with pytest.raises(ValueError, match="max_length must be at most rope_max_length 256, got"):
        OpenELMLM(model, checkpoint, max_length=300)


class Stopped(Exception):
    pass


def stopping_after(units: int):
    def report(total: int):
        left = [units]

        def step(task: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

        return step

    return report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_goes_on_to_the_same_bits(checkpoint, tasks, tmp_path, dtype):
    kind, requests = instances(tasks, "choices", 1)

    def lm(**options) -> OpenELMLM:
        return OpenELMLM(checkpoint, dtype=dtype, budget=100, **options)

    whole, told = lm().loglikelihood(requests), []

    def go_on(units: int) -> list:
        def report(total: int):
            told.append(total)
            return stopping_after(units)(total)

        return lm(store=Store(tmp_path, "this model"), progress=report).loglikelihood(requests)

    for units in (2, 1):
        with pytest.raises(Stopped):
            go_on(units)
    assert go_on(100) == whole
    assert told == [told[0], told[0] - 2, told[0] - 3]


def test_a_line_that_was_cut_off_is_computed_again(checkpoint, tasks, tmp_path):
    _, requests = instances(tasks, "letters", 0)
    first = OpenELMLM(checkpoint, store=Store(tmp_path), budget=60).loglikelihood(requests)
    (file,) = (tmp_path / "requests").iterdir()
    whole = file.read_text()
    for cut in (len(whole) - 1, len(whole) // 2, 3):
        file.write_text(whole[:cut])
        again = OpenELMLM(checkpoint, store=Store(tmp_path), budget=60).loglikelihood(requests)
        assert again == first and sorted(file.read_text().split()) == sorted(whole.split())


def test_another_model_or_other_requests_are_refused(checkpoint, tasks, tmp_path):
    _, requests = instances(tasks, "letters", 0)
    OpenELMLM(checkpoint, store=Store(tmp_path, "one")).loglikelihood(requests)
    for about, asked in (("other", requests), ("one", requests[1:])):
        with pytest.raises(ValueError, match="is of another checkpoint or of other requests"):
            OpenELMLM(checkpoint, store=Store(tmp_path, about)).loglikelihood(asked)


def test_fingerprints_tell_checkpoints_apart(checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    assert checkpoint_fingerprint(other) == checkpoint_fingerprint(checkpoint)
    model = elmkernels.OpenELM.from_pretrained(other)
    with torch.no_grad():
        model.norm.weight[3] += 1e-3
    model.save_pretrained(other)
    assert checkpoint_fingerprint(other) != checkpoint_fingerprint(checkpoint)


def evaluated(capsys, checkpoint, tasks, *more: str, code: int = 0) -> str:
    argv = ["eval", "--checkpoint", str(checkpoint), "--task-folder", str(tasks), *more]
    assert main(argv) == code
    return capsys.readouterr().out


def test_the_command(capsys, checkpoint, tasks, tmp_path):
    out = str(tmp_path / "out")
    text = evaluated(capsys, checkpoint, tasks, "--suite", "choices,writing", "--out", out)
    assert [line.split()[0] for line in text.splitlines()] == ["task", "choices", "writing"]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["complete"] and results["dtype"] == "float32"
    assert [row["metric"] for row in results["tasks"]] == ["acc_norm", "exact_match"]
    assert "| choices |" in (tmp_path / "out/summary.md").read_text()
    again = ("--suite", "choices,writing", "--out", out, "--json")
    found = json.loads(evaluated(capsys, checkpoint, tasks, *again))
    assert found["tasks"] == results["tasks"]
    limited = ("--suite", "choices", "--limit", "4", "--dtype", "bf16", "--eager", "--json")
    found = json.loads(evaluated(capsys, checkpoint, tasks, *limited))
    assert found["tasks"][0]["questions"] == 4 and found["dtype"] == "bfloat16"
    assert found["kernels"] == "none"


def test_an_interruption_keeps_what_was_computed(capsys, monkeypatch, checkpoint, tasks, tmp_path):
    generate = OpenELMLM._generate

    def interrupted(self, arguments):
        raise KeyboardInterrupt

    argv = ("--suite", "choices,writing", "--out", str(tmp_path))
    monkeypatch.setattr(OpenELMLM, "_generate", interrupted)
    evaluated(capsys, checkpoint, tasks, *argv, code=130)
    assert not json.loads((tmp_path / "results.json").read_text())["complete"]
    before = (tmp_path / "requests/choices-loglikelihood.jsonl").read_text()
    monkeypatch.setattr(OpenELMLM, "_generate", generate)
    evaluated(capsys, checkpoint, tasks, *argv)
    assert (tmp_path / "requests/choices-loglikelihood.jsonl").read_text() == before
    assert json.loads((tmp_path / "results.json").read_text())["complete"]


WRONG = {
    (
        "--suite",
        "nosuch",
    ): "suite must name tasks that lm-eval or the task folder has, got 'nosuch'",
    (
        "--suite",
        ",",
    ): "suite must be one of openelm-zero-shot, openllm, llm360, or tasks of lm-eval",
    ("--suite", "a,a"): "each once, got 'a,a'",
    ("--suite", "openllm,choices"): "suite must be openllm alone, or tasks without it",
    ("--suite", "openllm", "--examples", "3"): "examples must be None for openllm, which has",
    ("--suite", "choices", "--examples", "-1"): "--examples must be at least 0, got -1",
    ("--suite", "broken"): "the task broken can't be loaded",
    ("--suite", "unreachable"): "hf download --repo-type dataset someone/something",
    ("--suite", "lost"): "the data of lost can't be reached",
    ("--suite", "ones"): "suite must name tasks, ones is a tag of tagged",
}


def cases() -> list:
    """lm-eval's own tasks are looked through for a name that no folder has: half a minute."""
    slow = [pytest.mark.slow]
    return [pytest.param(a, marks=slow if "nosuch" in a else [], id=" ".join(a)) for a in WRONG]


def test_a_task_that_is_not_there(tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.raises(ValueError, match="suite must name tasks that lm-eval or the task folder"):
        harness._load(manager, "nosuch")


@pytest.mark.parametrize("argv", cases())
def test_wrong_input_is_one_line(capsys, monkeypatch, checkpoint, tmp_path, argv):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    own = write_tasks(tmp_path / "own", 2)
    text = (own / "choices.yaml").read_text()
    (own / "broken.yaml").write_text(
        text.replace("task: choices", "task: broken").replace("multiple_choice", "x")
    )
    lost = text.replace("task: choices", "task: lost").replace("questions.jsonl", "gone.jsonl")
    (own / "lost.yaml").write_text(lost)
    tagged = text.replace("task: choices", "task: tagged\ntag: ones")
    (own / "tagged.yaml").write_text(tagged)
    (own / "unreachable.yaml").write_text(
        "task: unreachable\ndataset_path: someone/something\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: a\n"
    )
    line = refusal(
        capsys, "eval", "--checkpoint", str(checkpoint), "--task-folder", str(own), *argv
    )
    assert WRONG[argv] in line


def test_a_checkpoint_without_a_tokenizer_is_one_line(capsys, tasks, tmp_path):
    write_checkpoint(tmp_path / "small")
    (tmp_path / "small/tokenizer.json").unlink()
    argv = ("eval", "--checkpoint", str(tmp_path / "small"), "--suite", "choices")
    assert "evaluating needs a tokenizer: --tokenizer PATH" in refusal(capsys, *argv)
