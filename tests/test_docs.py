"""The documents say what is true: links lead somewhere, commands parse, blocks run, figures are
those of the committed files, and what is generated is current.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elmkernels import __version__
from elmkernels.cli.main import main
from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.training.data.tokenizers import save as save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
RUN = [README, ROOT / "docs/getting-started.md"]  # whose Python blocks are one program each
TOP = ("benchmarks", "csrc", "docs", "elmkernels", "examples", "tests")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in found]


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline(path: Path) -> list[str]:
    """What stands in backticks, line breaks as spaces."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]


def test_the_readme_is_short_and_has_the_two_commands():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    install = "pip install torch==2.13.0 && pip install -e"
    first = {what: next(x for x in lines if what in x) for what in ("&& elmkernels", "&& python")}
    assert first["&& elmkernels"] == f"{install} . && elmkernels"
    assert first["&& python"] == f"{install} '.[test]' && python -m pytest"


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}]\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f'\nversion = "{__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name) if name else path
        assert found.exists(), f"{target} does not exist"
        assert not anchor or anchor in slugs(found), f"{target}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_paths_exist(path):
    """What looks like a path from the root, in backticks. <op> and * stand for any name."""
    for code in inline(path):
        if re.fullmatch(rf"({'|'.join(TOP)})/[\w./<>*-]*", code):
            pattern = re.sub(r"<\w+>", "*", code).rstrip("/")
            assert any(ROOT.glob(pattern)), f"{code} does not exist"


class Parsed(BaseException):
    """Raised after argparse is done, so that no command runs; nothing catches it on the way."""


@pytest.fixture
def parser(monkeypatch):
    """parse(words) parses a command line and runs nothing; it returns the top parser."""
    parse, inside = argparse.ArgumentParser.parse_known_args, []

    def parse_known_args(self, *args, **kwargs):
        if inside:
            return parse(self, *args, **kwargs)
        inside.append(self)
        try:
            found, unknown = parse(self, *args, **kwargs)
        finally:
            inside.clear()
        assert not unknown, f"unknown arguments: {unknown}"
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)

    def parse_only(words: list[str]) -> argparse.ArgumentParser | None:
        try:
            code = main(words)
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as end:  # --help
            code = end.code
        assert code == 0, f"elmkernels {shlex.join(words)} is refused"
        return None

    return parse_only


def commands(path: Path) -> list[list[str]]:
    """The arguments of every elmkernels command line: in shell blocks, and in backticks."""
    found = []
    for line in "\n".join(blocks(path, "sh")).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "elmkernels" in words:
                found.append(words[words.index("elmkernels") + 1 :])
    for code in inline(path):
        words = shlex.split(code) if code.startswith("elmkernels ") else []
        if words:  # what names a command without options need not be complete
            options = any(word.startswith("-") for word in words)
            found.append(words[1:] + ([] if options else ["--help"]))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_command_lines_parse(path, parser, capsys):
    for words in commands(path):
        parser(words)


def test_there_are_command_lines():
    assert len(commands(README)) >= 5
    assert len(commands(ROOT / "docs/cli.md")) >= 20


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= options_of(command)
    return found


def test_options_in_backticks_exist(parser):
    """In the documents of the commands; those of other programs have other documents."""
    known = options_of(parser([]))
    for name in ("cli", "training", "gpu", "benchmarks"):
        for code in inline(ROOT / f"docs/{name}.md"):
            if code.startswith("--"):
                assert code.split()[0] in known, f"docs/{name}.md: {code}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_python_blocks_compile_and_their_imports_resolve(path):
    for block in blocks(path, "python"):
        if "elmkernels.hf" in block or "transformers" in block:
            pytest.importorskip("transformers")
        if "peft" in block:
            pytest.importorskip("peft")
        if "lm_eval" in block or "evaluation.lm" in block:
            pytest.importorskip("lm_eval")
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("path", RUN, ids=relative)
def test_python_blocks_run(path, tmp_path, monkeypatch, capsys):
    """With a small model of OpenELM's vocabulary where the reader has OpenELM-270M."""
    pytest.importorskip("tokenizers")
    config = OpenELMConfig(
        num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2, ffn_dim_divisor=64,
        qkv_multipliers=(1.0, 2.0), normalize_qk_projections=True, share_input_output_layers=True,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = OpenELM.from_config(config, seed=0, dtype=torch.bfloat16)
    model.save_pretrained("OpenELM-270M")
    save_tokenizer("OpenELM-270M")
    found = blocks(path, "python")
    assert found
    exec(compile("\n".join(found), relative(path), "exec"), {})
    assert "accelerated" in capsys.readouterr().out


def either(found: dict, *names: str) -> float:
    return next(found[name] for name in names if name in found)


def main_job(place: int) -> tuple[str, float, float]:
    name = "openelm-270m-cpu"
    found = json.loads((ROOT / f"benchmarks/results/{name}/results.json").read_text())
    rates = found["dtypes"]["bfloat16"]["speed"][place]["tokens_per_second"]
    return name, rates["eager"], either(rates, "accelerated", "swapped")


def generation(name: str, group: str, *ours: str) -> tuple[str, float, float]:
    """Decoding at batch 1, beside the fastest of llama.cpp's file types."""
    found = json.loads((ROOT / f"benchmarks/results/{name}/results.json").read_text())
    (task,) = (t for t in found["groups"][group]["tasks"] if t["steps"] and t["batch"] == 1)
    rates = {n: r["tokens_per_second"]["median"] for n, r in task["runners"].items()}
    theirs = max(rate for n, rate in rates.items() if n.startswith("llama.cpp"))
    return name, theirs, either(rates, *ours)


def test_the_readmes_six_results_are_those_of_the_files():
    expected = [
        *map(main_job, range(3)),
        generation("generate-270m-cpu", "16-bit", "ours packed12", "ours packed"),
        generation("generate-270m-cpu", "int4", "ours int4"),
        generation("generate-1_1b-cpu", "16-bit", "ours bf16"),
    ]
    table = README.read_text().split("<!-- generated: results -->")[1].split("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    ratios = []
    for row, (name, theirs, mine) in zip(rows, expected, strict=True):
        assert f"benchmarks/results/{name}/results.json" in row[5]
        assert [float(row[2]), float(row[3])] == pytest.approx([theirs, mine], rel=5e-3)
        ratios.append(float(row[4].removesuffix("x")))
        assert ratios[-1] == pytest.approx(mine / theirs, abs=5.1e-3)
    assert min(ratios) < 1, "losses stand beside wins"


def test_what_is_generated_is_current():
    done = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
