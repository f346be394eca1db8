"""elmkernels generate --chat: turns from stdin, replies as they come."""

import io

import pytest
from helpers.commands import TINY, main, refusal
from helpers.harness_tasks import write_checkpoint

from elmkernels.cli import generate as command
from elmkernels.generation.chat import Chat
from elmkernels.openelm import OpenELM, Tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "small")


def say(monkeypatch, capsys, checkpoint, text: str, *more: str, tty: bool = False, code: int = 0):
    stdin = io.StringIO(text)
    stdin.isatty = lambda: tty
    monkeypatch.setattr("sys.stdin", stdin)
    argv = ["generate", "--checkpoint", str(checkpoint), "--chat", "--max-new-tokens", "5", *more]
    assert main(argv) == code
    return capsys.readouterr()


def test_piped_turns_get_a_reply_each(monkeypatch, capsys, checkpoint):
    said = say(monkeypatch, capsys, checkpoint, "a cat\n\nsat on\nthe mat", "--dtype", "fp32")
    model = OpenELM.from_pretrained(checkpoint)
    chat = Chat(model, Tokenizer.from_pretrained(checkpoint), max_new_tokens=5)
    expected = ["".join(chat.say(text).text()) for text in ("a cat", "sat on", "the mat")]
    assert said.out == "".join(f"{reply}\n" for reply in expected)
    assert ">" not in said.err and "error" not in said.err


def test_a_terminal_gets_a_prompt(monkeypatch, capsys, checkpoint):
    said = say(monkeypatch, capsys, checkpoint, "a cat\nb\n", tty=True)
    assert said.err.count("> ") == 3 and said.err.endswith("\n")


def test_the_session_is_kept(monkeypatch, capsys, checkpoint):
    reused = []

    class Watched(Chat):
        def say(self, text):
            stream = super().say(text)
            reused.append(stream.reused[0])
            return stream

    monkeypatch.setattr(command, "Chat", Watched)
    say(monkeypatch, capsys, checkpoint, "a cat\nsat\n", "--temperature", "0.8", "--seed", "1")
    assert reused[0] == 0 and reused[1] > 10


def test_ctrl_c_ends_a_reply_and_not_the_chat(monkeypatch, capsys, checkpoint):
    add, count = command._Live.add, [0]

    def interrupted(self, row, token):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        add(self, row, token)

    monkeypatch.setattr(command._Live, "add", interrupted)
    said = say(monkeypatch, capsys, checkpoint, "a cat\nsat\n")
    assert said.out.count("\n") >= 2 and count[0] > 4


def test_a_turn_that_does_not_fit_is_said_and_the_chat_goes_on(monkeypatch, capsys, checkpoint):
    said = say(monkeypatch, capsys, checkpoint, "cat " * 300 + "\na\n")
    assert said.err.count("error: text must be at most 256 tokens with its reply, got") == 1
    assert said.out.count("\n") >= 1


WRONG = {
    ("--prompt", "a"): "--chat takes its turns from stdin: give it without --prompt or --ids",
    ("--ids", "1"): "--chat takes its turns from stdin: give it without --prompt or --ids",
    ("--json",): "--chat takes its turns from stdin: give it without --json",
    ("--stream",): "--chat takes its turns from stdin: give it without --stream",
}


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_refusals(capsys, checkpoint, argv):
    line = refusal(capsys, "generate", "--checkpoint", str(checkpoint), "--chat", *argv)
    assert WRONG[argv] in line


def test_without_a_tokenizer(capsys):
    line = refusal(capsys, "generate", "--checkpoint", str(TINY), "--chat")
    assert "--chat needs a tokenizer" in line


def test_bytes_that_are_no_text(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    line = refusal(capsys, "generate", "--checkpoint", str(checkpoint), "--chat")
    assert "can't decode byte" in line
