"""Without compiled kernels every command that runs a model says so, in one line."""

import pytest
from helpers.commands import TINY

from elmkernels.cli.main import main

MISSING = "no compiled kernels: any reason; reinstall with: any command"
GENERATE = ["generate", "--checkpoint", str(TINY), "--ids", "1", "--max-new-tokens", "1"]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmkernels.acceleration.swap.missing_kernels", lambda device: MISSING)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("more", [[], ["--json"], ["--stream"], ["--bits", "8"], ["--packed12"]])
def test_generate(capsys, more):
    assert main([*GENERATE, "--device", "cpu", *more]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == f"elmkernels: {MISSING}"
    assert MISSING not in captured.out


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("more", [["--eager"], ["--backend", "reference"]])
def test_who_asks_for_the_reference_knows(capsys, more):
    assert main([*GENERATE, "--device", "cpu", *more]) == 0
    assert MISSING not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "train"])
def test_benchmarks(capsys, monkeypatch, command):
    monkeypatch.setattr("elmkernels.cli.options.missing_kernels", lambda device: MISSING)
    monkeypatch.setattr(f"elmkernels.cli.bench.{command}.carry_out", lambda *_: 0)
    argv = ["bench", command, "--quick"]
    argv += ["--checkpoint", str(TINY)] if command == "generate" else ["--device", "cpu"]
    assert main(argv) == 0
    assert capsys.readouterr().err == f"elmkernels: {MISSING}\n"
    assert main([*argv, "--backend", "reference"]) == 0
    assert capsys.readouterr().err == ""
