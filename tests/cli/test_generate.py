"""The command `generate`: what it prints, by text and by ids, and what it refuses."""

import io
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from helpers.commands import TINY, refusal, run_json, start
from helpers.tokenizers import hugging_face, sentence_piece
from safetensors.torch import load_file

from elmkernels.cli import generate as command
from elmkernels.cli.main import main
from elmkernels.openelm import OpenELM, accelerate, generate
from elmkernels.openelm.tokenizer import Tokenizer

CPU = ["generate", "--device", "cpu", "--dtype", "fp32"]
HERE = [*CPU, "--checkpoint", str(TINY)]
GOLDEN = load_file(TINY / "expected.safetensors")["greedy_9_plus_24"][0].tolist()
WARM = ["--temperature", "1"]
PROMPT = ",".join(map(str, GOLDEN[:9]))


@pytest.fixture
def folder(tmp_path):
    """The tiny checkpoint, to put a tokenizer beside it."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


@pytest.mark.parametrize("options", [[], ["--eager"], ["--stream"], ["--backend", "reference"]])
def test_golden_ids(capsys, options):
    assert main([*HERE, "--ids", PROMPT, "--max-new-tokens", "24", "--stop", "none", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == ",".join(map(str, GOLDEN[9:])) + "\n"
    assert captured.err.startswith("elmkernels: prompt: 9 tokens")
    assert "generated: 24 tokens (" in captured.err and "tokens/s" in captured.err


def test_a_batch_as_json_and_from_a_file(capsys, tmp_path):
    ids = [[1, 2, 3], [4], [5, 6]]
    file = tmp_path / "ids.txt"
    file.write_text("1, 2,3\n\n4\n")
    argv = [*HERE, "--ids", str(file), "--ids", "5 6", "--max-new-tokens", "6", "--stop", "none"]
    found = run_json(capsys, *argv)
    model = OpenELM.from_pretrained(TINY)
    accelerate(model)
    rows = generate(model, ids, 6)
    assert [row["prompt"] for row in found["rows"]] == ids
    assert [row["tokens"] for row in found["rows"]] == [row.tokens for row in rows]
    assert {row["finish_reason"] for row in found["rows"]} == {"length"}
    assert found["generated_tokens"] == 18 and found["prompt_tokens"] == 6
    assert found["decode_mode"] == "calls"
    assert found["tokens_per_second"] == pytest.approx(15 / found["generation_seconds"])
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [",".join(map(str, row.tokens)) for row in rows]


def test_sampling_options_reach_the_model(capsys):
    options = ["--temperature", "1.1", "--top-k", "50", "--top-p", "0.9"]
    options += ["--repetition-penalty", "1.3", "--seed", "7", "--max-new-tokens", "12"]
    found = run_json(capsys, *HERE, "--ids", "1,2", "--ids", "3", *options)
    model = OpenELM.from_pretrained(TINY)
    accelerate(model)
    sampling = {"temperature": 1.1, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3}
    rows = generate(model, [[1, 2], [3]], 12, seed=7, stop_tokens=2, **sampling)
    assert [row["tokens"] for row in found["rows"]] == [row.tokens for row in rows]
    assert found["rows"][0]["tokens"] != GOLDEN[9:21]


@pytest.mark.parametrize("draft", ["lookup", "self", str(TINY)])
def test_a_draft_changes_nothing_but_what_is_said(capsys, draft):
    argv = [*HERE, "--ids", PROMPT, "--ids", "1,2", "--stop", "none", "--max-new-tokens", "16"]
    plain = run_json(capsys, *argv)
    found = run_json(capsys, *argv, "--draft", draft, "--draft-tokens", "3")
    assert found["rows"] == plain["rows"] and plain["speculation"] is None
    said = found["speculation"]
    assert said["draft"] == (draft if draft in ("lookup", "self") else "draft")
    assert 0 <= said["accepted"] <= said["guessed"] and said["passes"] > 0
    assert (said["acceptance"] == 1) == (draft == str(TINY))
    assert main([*argv, "--draft", draft, "--draft-tokens", "3"]) == 0
    assert f"{said['accepted']} of {said['guessed']} guesses kept" in capsys.readouterr().err
    drawn = [*argv[:-2], "--temperature", "1", "--seed", "4", "--max-new-tokens", "9"]
    assert run_json(capsys, *drawn, "--draft", draft)["rows"] == run_json(capsys, *drawn)["rows"]


def test_drafts_that_are_none(capsys, tmp_path):
    argv = [*HERE, "--ids", "1"]
    said = refusal(capsys, *argv, "--draft", str(tmp_path / "nothing"))
    assert "--draft must be lookup, self or a checkpoint" in said and "nothing" in said
    assert "--draft-tokens belongs to --draft" in refusal(capsys, *argv, "--draft-tokens", "2")
    assert "--draft-tokens" in refusal(capsys, *argv, "--draft", "self", "--draft-tokens", "0")


def test_stop_tokens(capsys):
    assert main([*HERE, "--ids", PROMPT, "--stop", f"319,{GOLDEN[14]}"]) == 0
    first = GOLDEN.index(GOLDEN[14], 9)
    assert capsys.readouterr().out == ",".join(map(str, GOLDEN[9:first])) + "\n"


def test_random_weights_of_a_seed(capsys, monkeypatch):
    """--model and --seed, without drawing a whole model: the tiny one takes its place."""
    drawn = []

    def from_config(config, seed, dtype, device):
        drawn.append((config.model_name, seed, dtype))
        return OpenELM.from_pretrained(TINY, dtype=dtype, device=device)

    monkeypatch.setattr(OpenELM, "from_config", from_config)
    found = run_json(capsys, *CPU, "--model", "1.1b", "--seed", "5", "--ids", "1")
    assert drawn == [("OpenELM-1_1B", 5, torch.float32)]
    assert found["weights"] == "random weights of seed 5"


@pytest.mark.parametrize("make", [hugging_face, sentence_piece])
def test_text(capsys, folder, make):
    tokenizer = Tokenizer(make(folder))
    argv = [*CPU, "--checkpoint", str(folder), "--prompt", "the cat", "--max-new-tokens", "20"]
    found = run_json(capsys, *argv)
    (row,) = found["rows"]
    assert row["prompt"] == tokenizer.encode("the cat") and row["prompt"][0] == 1
    assert row["text"] == tokenizer.continuation(row["prompt"], row["tokens"])
    for options in ([], ["--stream"]):
        assert main([*argv, *options]) == 0
        assert capsys.readouterr().out == row["text"] + "\n"
    assert main([*argv, "--prompt", "a dog"]) == 0
    lines = capsys.readouterr().out
    assert lines.startswith(f"[0] {row['text']}\n[1] ")


def test_the_bos_of_the_checkpoint_and_a_tokenizer_elsewhere(capsys, folder, tmp_path):
    file = hugging_face(tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"bos_token_id": 1', '"bos_token_id": 2'))
    argv = [*CPU, "--checkpoint", str(folder), "--prompt", "the", "--max-new-tokens", "1"]
    for place in (file, tmp_path):
        found = run_json(capsys, *argv, "--tokenizer", str(place))
        assert found["rows"][0]["prompt"][0] == 2


def test_ids_need_no_library(capsys, folder, monkeypatch):
    hugging_face(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    argv = [*CPU, "--checkpoint", str(folder), "--max-new-tokens", "2"]
    assert main([*argv, "--ids", "1"]) == 0
    assert capsys.readouterr().out.count(",") == 1
    assert "pip install tokenizers" in refusal(capsys, *argv, "--prompt", "the")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_interruption_prints_what_was_generated(capsys, monkeypatch, streamed):
    passes = []
    forward = OpenELM.forward

    def interrupted(self, *args, **kwargs):
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(OpenELM, "forward", interrupted)
    argv = [*HERE, "--ids", PROMPT, "--eager", "--stop", "none", "--stream"]
    assert main(argv if streamed else argv[:-1]) == 130
    captured = capsys.readouterr()
    assert captured.out == ",".join(map(str, GOLDEN[9:13])) + "\n"
    assert "interrupted" in captured.err


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(tmp_path, sent, code):
    argv = [*HERE, "--ids", "1,2,3", "--max-new-tokens", "500", "--stop", "none", "--stream"]
    process = start(*argv)
    seen = process.stdout.read(8)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    ids = [int(i) for i in (seen + out).split(",")]
    if process.returncode == 0:
        pytest.skip("it ended before the signal came")
    assert process.returncode == code
    assert "Traceback" not in err and "interrupted" in err
    assert 0 < len(ids) < 500


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--ids", "1"], "one of the arguments --checkpoint --model is required"),
        (["--checkpoint", str(TINY)], "--prompt TEXT or --ids"),
        (["--checkpoint", "nowhere", "--ids", "1"], "nowhere"),
        (["--checkpoint", str(TINY), "--prompt", "hello"], "--tokenizer PATH"),
        (["--checkpoint", str(TINY), "--ids", ""], "got ''"),
        (["--checkpoint", str(TINY), "--ids", "1,x"], "'1,x'"),
        (["--checkpoint", str(TINY), "--ids", "-4"], "'-4'"),
        (["--checkpoint", str(TINY), "--ids", "x" * 5000], "xxx"),
        (["--checkpoint", str(TINY), "--ids", "1,320"], "[0, 320), got 320"),
        (["--checkpoint", str(TINY), "--ids", "1", "--stop", "320"], "[0, 320), got 320"),
        (["--checkpoint", str(TINY), "--ids", "1", "--stop", "eos"], "'eos'"),
        (["--checkpoint", str(TINY), "--ids", "1", "--max-new-tokens", "512"], "got 1 + 512"),
        (["--checkpoint", str(TINY), "--ids", "1", "--max-new-tokens", "0"], "'0'"),
        (["--checkpoint", str(TINY), "--ids", "1", "--temperature", "-1"], "got -1.0"),
        (
            ["--checkpoint", str(TINY), "--ids", "1", "--temperature", "1", "--top-p", "0"],
            "got 0.0",
        ),
        (
            ["--checkpoint", str(TINY), "--ids", "1", "--temperature", "1", "--top-p", "1.1"],
            "got 1.1",
        ),
        (["--checkpoint", str(TINY), "--ids", "1", *WARM, "--top-k", "0"], "got 0"),
        (["--checkpoint", str(TINY), "--ids", "1", "--repetition-penalty", "0"], "got 0.0"),
        (["--checkpoint", str(TINY), "--ids", "1", "--tokenizer", "nowhere"], "nowhere"),
        (["--checkpoint", str(TINY), "--ids", "1", "--stream", "--json"], "--json"),
        (["--checkpoint", str(TINY), "--ids", "1", "--ids", "2", "--stream"], "got 2"),
        (["--checkpoint", str(TINY), "--ids", "1", "--dtype", "fp32,bf16"], "got 'fp32,bf16'"),
        (["--checkpoint", str(TINY), "--ids", "1", "--group-size", "32"], "--bits"),
        (["--checkpoint", str(TINY), "--ids", "1", "--bits", "5"], "--bits"),
        (["--checkpoint", str(TINY), "--ids", "1", "--activations", "int4"], "one of int8"),
        (["--checkpoint", str(TINY), "--ids", "1", "--activations", "int8"], "quantized to 8 or 4"),
        (
            [
                "--checkpoint",
                str(TINY),
                "--ids",
                "1",
                "--bits",
                "8",
                "--group-size",
                "32",
                "--activations",
                "int8",
                "--eager",
            ],
            "--activations has no effect with --eager",
        ),
        (["--checkpoint", str(TINY), "--ids", "1", "--bits", "8", "--packed12"], "--packed12"),
        (["--checkpoint", str(TINY), "--ids", "1", "--eager", "--backend", "avx2"], "--eager"),
        (
            ["--checkpoint", str(TINY), "--ids", "1", "--decode-mode", "graph"],
            "needs a CUDA device",
        ),
        (["--checkpoint", str(TINY), "--ids", "1", "--decode-mode", "magic"], "'magic'"),
        (
            ["--checkpoint", str(TINY), "--model", "270M", "--ids", "1"],
            "not allowed with argument --checkpoint",
        ),
        (["--model", "9B", "--ids", "1"], "'9B'"),
        (["--checkpoint", str(TINY), "--ids", "9" * 5000], "must hold token ids"),
        (["--checkpoint", str(TINY), "--ids", "1", "--stop-string", "x"], "--stop-string needs a"),
        (["--checkpoint", str(TINY), "--ids", "1", *WARM, "--top-p", "nan"], "got nan"),
        (["--checkpoint", str(TINY), "--ids", "1", *WARM, "--top-p", "x"], "--top-p"),
        (["--checkpoint", str(TINY), "--ids", "1", "--temperature", "inf"], "got inf"),
        (["--checkpoint", str(TINY), "--ids", "1", *WARM, "--seed", str(2**64)], "seed must be"),
        (["--checkpoint", str(TINY), "--ids", "1", "--repetition-penalty", "nan"], "got nan"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(capsys, argv, named):
    assert named in refusal(capsys, *CPU, *argv)


@pytest.mark.parametrize("option", [["--top-k", "5"], ["--top-p", "0.9"], ["--seed", "1"]])
def test_what_draws_has_no_effect_at_temperature_0(capsys, option):
    said = refusal(capsys, *HERE, "--ids", "1", *option)
    assert said.startswith(f"elmkernels: error: {option[0]} has no effect at temperature 0")
    assert main([*HERE, "--ids", "1", "--max-new-tokens", "1", "--temperature", "1", *option]) == 0


def test_the_summary_names_the_decode_mode_of_a_gpu():
    """Which is 'calls' on a CPU, and then not worth a word."""
    found = {
        "prompt_tokens": 2,
        "prompt_tokens_per_second": None,
        "generated_tokens": 3,
        "tokens_per_second": 9.0,
    }
    assert command._summary(found | {"decode_mode": "calls"}).endswith("3 tokens (9.0 tokens/s)")
    assert command._summary(found | {"decode_mode": "graph"}).endswith(", decoded by graph")


def test_a_truncated_checkpoint_and_tokenizer(capsys, folder):
    pytest.importorskip("tokenizers")
    argv = [*CPU, "--checkpoint", str(folder), "--ids", "1"]
    file = hugging_face(folder)
    file.write_text(file.read_text()[:-100])
    assert "tokenizer.json is not a tokenizer" in refusal(capsys, *argv)
    file.unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refusal(capsys, *argv)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(capsys, *argv)


def test_an_empty_file_of_ids(capsys, tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("\n")
    assert "empty file" in refusal(capsys, *HERE, "--ids", str(file))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_stop_string(capsys, monkeypatch, folder, streamed):
    hugging_face(folder)
    letters = "".join  # a random model writes no text: each token stands for a letter
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids: letters(chr(97 + i % 26) for i in ids)
    )
    argv = [*CPU, "--checkpoint", str(folder), "--prompt", "the cat", "--max-new-tokens", "30"]
    argv += ["--stop", "none"]
    text = run_json(capsys, *argv)["rows"][0]["text"]
    stop = text[7:9]
    argv += ["--stop-string", "not there", "--stop-string", stop]
    if not streamed:
        (row,) = run_json(capsys, *argv)["rows"]
        assert row["text"] == text[: text.index(stop)]
        assert (row["finish_reason"], row["stopped_by"]) == ("stop", stop)
        assert len(row["tokens"]) == text.index(stop) + 2
    assert main([*argv, *["--stream"] * streamed]) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_any_encoding_of_stdout(monkeypatch, folder, encoding, streamed):
    """What it doesn't have is escaped; afterwards stdout is what it was."""
    hugging_face(folder)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\u00e9\u732b\U0001f408" * len(ids))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict", newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    argv = [*CPU, "--checkpoint", str(folder), "--ids", "1", "--max-new-tokens", "2"]
    assert main([*argv, *["--stream"] * streamed]) == 0
    assert stdout.errors == "strict"
    stdout.flush()
    printed = stdout.buffer.getvalue().decode(encoding)
    expected = ("\u00e9\u732b\U0001f408" * 2 + "\n").encode(encoding, "backslashreplace")
    assert printed == expected.decode(encoding)


def test_the_checkpoints_own_end(capsys, folder):
    found = run_json(capsys, *HERE, "--ids", PROMPT, "--stop", "none", "--max-new-tokens", "24")
    tokens = found["rows"][0]["tokens"]
    end = tokens[6]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [5000, end]}))
    argv = [*CPU, "--checkpoint", str(folder), "--ids", PROMPT, "--max-new-tokens", "24"]
    (row,) = run_json(capsys, *argv)["rows"]
    assert row["tokens"] == tokens[: tokens.index(end)] and row["stopped_by"] == end


def test_a_temperature_below_float32_draws_nothing(capsys):
    said = refusal(capsys, *HERE, "--ids", "1", "--temperature", "1e-46", "--top-k", "5")
    assert "--top-k has no effect at temperature 0" in said
    argv = [*HERE, "--ids", PROMPT, "--max-new-tokens", "24", "--stop", "none"]
    assert main([*argv, "--temperature", "1e-46"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, GOLDEN[9:])) + "\n"
