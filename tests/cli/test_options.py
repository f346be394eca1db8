"""What a command takes: its help, its own options and no others, and what none of them can mean."""

import shutil

import pytest
from helpers.commands import TINY, refusal

import elmkernels
from elmkernels import backends
from elmkernels.cli import check, main, options
from elmkernels.cli.main import BENCHES, COMMANDS, build_parser
from elmkernels.cli.train import READY
from elmkernels.training.recipe import ready

NAMES = [[command.NAME] for command in COMMANDS]
NAMES += [["bench"], *(["bench", command.NAME] for command in BENCHES)]
# What each command needs before anything else can be wrong.
NEEDS = {
    "generate": ["--model", "270M", "--ids", "1"],
    "eval": ["--checkpoint", str(TINY), "--suite", "openllm"],
    "convert": ["--checkpoint", str(TINY), "--to", "packed12", "--out", "nowhere"],
    "train": ["tiny"],
    "gpu-check": ["--out", "nowhere"],
}
ALL_OPTIONS = {
    "--json": [], "--device": ["cpu"], "--dtype": ["bf16"], "--backend": ["reference"],
    "--model": ["270M"], "--checkpoint": ["x"], "--config": ["x"], "--out": ["x"], "--quick": [],
    "--rounds": ["2"], "--seed": ["1"], "--prepack": [],
    "--activations": ["int8"], "--formats": ["fp32"], "--steps": ["2"],
    "--batch": ["2"], "--tokens": ["2"], "--prefill": ["2"], "--no-compile": [], "--gemm": [],
    "--prompt": ["2"], "--ids": ["1"], "--stream": [], "--eager": [], "--to": ["gguf"],
    "--resume": [], "--compare": [], "--minutes": ["1"], "--stages": ["ops"], "--watch": [],
}  # fmt: skip


def printed(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """What a command prints that ends in argparse, as --help does."""
    with pytest.raises(SystemExit) as stopped:
        main.main([*argv])
    assert stopped.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", [[], *NAMES], ids=" ".join)
def test_help_fits_a_screen(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys, *command, "--help").splitlines()
    assert lines[0].startswith(" ".join(["usage: elmkernels", *command]))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= columns


def test_help_names_every_command(capsys, wide):
    text = printed(capsys, "--help")
    for command in (*NAMES, ["-h"], ["--version"]):
        assert command[0] in text
    text = printed(capsys, "bench", "--help")
    for command in BENCHES:
        assert f"\n    {command.NAME} " in text


OF_MODELS = [["check"], ["generate"], ["eval"], ["bench", "generate"], ["bench", "train"]]


@pytest.mark.parametrize("name", backends.BACKENDS)
@pytest.mark.parametrize("command", OF_MODELS, ids=" ".join)
def test_only_a_backend_of_whole_models_is_offered_for_one(capsys, wide, command, name):
    """Which others have kernels for a few ops is for `parity` and `bench ops`."""
    text = " ".join(printed(capsys, *command, "--help").split())
    offered = text.partition("--backend NAME ")[2].partition(" (default")[0].split(", ")
    whole = name not in ("cuda", "sdpa")  # which have no kernels for swiglu, or for most ops
    assert (name in offered) == whole
    if not whole:
        assert main.main([*command, "--backend", name]) == 2
        assert f"must be one of {', '.join(offered)}, got {name!r}" in capsys.readouterr().err


def test_the_help_names_every_ready_recipe(capsys, wide):
    """And `train` by its own list, which the help can't wait for."""
    assert set(READY) == set(ready())
    assert all(name in printed(capsys, "train", "--help") for name in ready())


def test_version(capsys):
    assert printed(capsys, "--version") == f"elmkernels {elmkernels.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--quick"], ["--model", "1.1b", "--rounds", "3"]])
def test_without_a_command_it_is_check(monkeypatch, argv):
    seen = []
    monkeypatch.setattr(check, "run", lambda args: seen.append(vars(args)) or 0)
    assert main.main(argv) == main.main(["check", *argv]) == 0
    assert seen[0] == seen[1] and seen[0]["quick"] == ("--quick" in argv)
    assert seen[0]["model"] == ("OpenELM-1_1B" if "--model" in argv else None)


def known(command: list[str]) -> set[str]:
    """The options of a command, as its parser has them."""
    parser = build_parser()
    for name in command:
        (choices,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
        parser = choices[name]
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("command", [n for n in NAMES if n != ["bench"]], ids=" ".join)
def test_an_option_of_another_command_is_refused(capsys, command):
    foreign = [option for option in ALL_OPTIONS if option not in known(command)]
    assert len(foreign) >= 10
    for option in foreign:
        argv = [*command, *NEEDS.get(command[-1] if len(command) == 1 else "", [])]
        said = refusal(capsys, *argv, option, *ALL_OPTIONS[option])
        assert f"unrecognized arguments: {option}" in said


def test_every_command_knows_some_option_that_is_tried():
    tried = set().union(*(known(command) for command in NAMES))
    assert set(ALL_OPTIONS) <= tried


@pytest.mark.parametrize("command", [n for n in NAMES if n != ["bench"]], ids=" ".join)
def test_an_option_is_not_abbreviated(capsys, command):
    argv = [*command, *NEEDS.get(command[-1] if len(command) == 1 else "", [])]
    assert "unrecognized arguments: --jso" in refusal(capsys, *argv, "--jso")


@pytest.mark.parametrize(
    ("text", "name"),
    [("270M", "OpenELM-270M"), ("openelm-1.1b", "OpenELM-1_1B"), ("OpenELM-3B", "OpenELM-3B")],
)
def test_a_model_by_the_name_that_people_write(text, name):
    assert options.variant(text) == name


class TestCheckpoint:
    """Whatever takes a checkpoint says what is wrong with the path before it reads anything."""

    COMMANDS = (
        ["check"],
        ["bench", "generate"],
        ["generate", "--ids", "1"],
        ["eval", "--suite", "openllm"],
        ["convert", "--to", "quantized", "--out", "nowhere"],
    )

    @pytest.fixture(params=COMMANDS, ids=lambda command: command[0])
    def command(self, request) -> list[str]:
        return request.param

    def test_a_file_of_a_folder(self, capsys, tmp_path, command):
        folder = shutil.copytree(TINY, tmp_path / "model")
        said = refusal(capsys, *command, "--checkpoint", str(folder / "model.safetensors"))
        assert "is a file: give the folder that holds it" in said and str(folder) in said

    def test_a_file_without_its_shape(self, capsys, tmp_path, command):
        for name in ("model.pt", "model.safetensors"):
            (tmp_path / name).write_bytes(b"any")
            said = refusal(capsys, *command, "--checkpoint", str(tmp_path / name))
            assert "is a file: give a Hugging Face folder" in said and "--config" in said

    def test_a_gguf_file(self, capsys, tmp_path, command):
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        said = refusal(capsys, *command, "--checkpoint", str(tmp_path / "m.gguf"))
        assert "is a GGUF file, which is written (convert --to gguf) but not read" in said

    def test_a_folder_with_a_shape(self, capsys, command):
        argv = [*command, "--checkpoint", str(TINY), "--config", "OpenELM-270M"]
        assert "--config describes a single file" in refusal(capsys, *argv)

    def test_nothing(self, capsys, command):
        said = refusal(capsys, *command, "--checkpoint", "apple/OpenELM-270M")
        assert "--checkpoint: apple/OpenELM-270M does not exist" in said


@pytest.mark.parametrize("command", [["check", "--device", "cpu"], ["bench", "generate"]])
def test_a_wrong_checkpoint_leaves_no_folder(capsys, tmp_path, command):
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "config.json").write_text("{")
    out = tmp_path / "out"
    argv = [*command, "--checkpoint", str(folder), "--out", str(out)]
    assert "config.json is not valid JSON" in refusal(capsys, *argv)
    assert not out.exists()
