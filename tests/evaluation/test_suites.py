"""The suites and the published figures: one file, and what is made of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elmkernels.evaluation import suites
from elmkernels.openelm import OpenELMConfig
from elmkernels.openelm.config import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
MODELS = [f"{name}{tuned}" for name in VARIANTS for tuned in ("", "-Instruct")]


@pytest.mark.parametrize("suite", suites.names())
@pytest.mark.parametrize("model", MODELS)
def test_each_model_has_a_figure_of_each_task_and_their_mean(suite, model):
    name, chosen = suites.find(suite)
    figures = suites.figures(suite, model)
    assert name == suite and [*figures] == [one.label for one in chosen] + [suites.AVERAGE]
    values = [figures[one.label] for one in chosen]
    assert abs(sum(values) / len(values) - figures[suites.AVERAGE]) < 0.011  # two of them are cut
    assert all(one.examples is not None and one.metric for one in chosen)


def test_what_two_suites_share_is_the_same():
    for model in MODELS:
        five, eight = (suites.figures(suite, model) for suite in ("openllm", "llm360"))
        shared = (five.keys() & eight.keys()) - {suites.AVERAGE}
        assert len(shared) == 5 and all(five[label] == eight[label] for label in shared)
        zero = suites.figures("openelm-zero-shot", model)
        assert zero["PIQA"] == eight["PIQA"]


def test_a_figure_is_read_as_it_stands():
    assert suites.figures("openllm", "OpenELM-1_1B")[suites.AVERAGE] == 45.93
    assert suites.figures("openelm-zero-shot", "OpenELM-270M")["HellaSwag"] == 46.71
    assert suites.figures("llm360", "OpenELM-3B-Instruct")["CrowS-Pairs"] == 72.33
    assert suites.figures(None, "OpenELM-3B") == suites.figures("openllm", None) == {}
    assert "2404.14619" in suites.source()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_is_known_by_its_shape(name):
    config = OpenELMConfig.from_name(name)
    assert suites.published_model(config, "some folder") == name
    assert suites.published_model(config, f"my-{name}-instruct") == f"{name}-Instruct"
    other = OpenELMConfig.from_name(name, model_dim=config.model_dim // 2)
    assert suites.published_model(other, name) is None


def test_named_tasks():
    assert suites.find("a, b", 3) == (None, [suites.Chosen(n, n, 3) for n in ("a", "b")])


def test_the_command_names_what_to_install(tmp_path):
    """lm-eval is only asked for by the command itself, and said to be missing in one line."""
    script = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from elmkernels.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    from helpers.harness_tasks import write_checkpoint

    argv = ["eval", "--checkpoint", str(write_checkpoint(tmp_path)), "--suite", "openllm"]
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "evaluating needs lm-eval" in done.stderr and "elmkernels[eval]" in done.stderr


def test_the_file_is_plain_json():
    values = json.loads((ROOT / "elmkernels/evaluation/published.json").read_text())
    assert set(values) == {"source", "suites", "figures"}
