"""Conversations: the template, the ids, and a cache that is kept from turn to turn."""

import json

import pytest
import torch
from helpers.tokenizers import hugging_face, sentence_piece
from helpers.transformers_models import body

from elmkernels import generate
from elmkernels.generation.chat import TEMPLATE, Chat, Template
from elmkernels.openelm import Tokenizer

HELLO = [{"role": "user", "content": "a cat"}]
LONGER = [*HELLO, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]


def test_the_documented_template():
    said = Template(TEMPLATE)
    assert said(HELLO) == "<|user|>\na cat</s>\n<|assistant|>\n"
    assert said([{"role": "system", "content": "Be brief."}, *LONGER]) == (
        "<|system|>\nBe brief.</s>\n<|user|>\na cat</s>\n<|assistant|>\nsat</s>\n"
        "<|user|>\non</s>\n<|assistant|>\n"
    )


def test_transformers_makes_the_same_of_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(hugging_face(tmp_path)), eos_token="</s>", chat_template=TEMPLATE
    )
    said = tokenizer.apply_chat_template(LONGER, tokenize=False, add_generation_prompt=True)
    assert said == Template(TEMPLATE)(LONGER)


OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("place", ["file", "key", "several", "none", "no folder"])
def test_a_checkpoints_own_template_goes_first(tmp_path, place):
    key: object = OWN if place == "key" else None
    if place == "several":
        key = [{"name": "tool", "template": "x"}, {"name": "default", "template": OWN}]
    values = {"eos_token": {"content": "<end>"}} | ({"chat_template": key} if key else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(OWN)
    said = Template.of(None if place == "no folder" else tmp_path)(HELLO)
    own, default = "[user] a cat<end>", "<|user|>\na cat{}\n<|assistant|>\n"
    plain = default.format("</s>" if place == "no folder" else "<end>")
    assert said == (plain if place in ("none", "no folder") else own)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for %}", "the chat template can't be read"),
        ("{{ raise_exception('only users') }}", "the chat template refuses it: only users"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses it"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "the chat template refuses it"),
    ],
)
def test_templates_that_refuse(source, message):
    with pytest.raises(ValueError, match=message):
        Template(source)(HELLO)


@pytest.fixture(params=["tokenizers", "sentencepiece"])
def tokenizer(request, tmp_path):
    make = hugging_face if request.param == "tokenizers" else sentence_piece
    return Tokenizer(make(tmp_path), 1)


def test_special_tokens_are_ids_with_either_library(tokenizer):
    chat = Chat(body(), tokenizer, max_new_tokens=4)
    ids = chat.encode("<s>" + Template(TEMPLATE)(LONGER))
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 3
    assert chat.encode(Template(TEMPLATE)(LONGER)) == ids


def reply(chat: Chat, text: str) -> tuple[str, int]:
    stream = chat.say(text)
    return "".join(stream.text()), stream.reused[0]


def test_each_turn_reads_what_is_new(tokenizer):
    torch.set_num_threads(1)
    model = body(rope_max_length=512)
    chat = Chat(model, tokenizer, max_new_tokens=6, stop_tokens=())
    first, reused = reply(chat, "a cat sat")
    held = len(chat.encode(chat.template(chat.messages)))
    assert reused == 0 and [m["role"] for m in chat.messages] == ["user"]
    second, reused = reply(chat, "on the mat")
    assert reused >= held - 1
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "user"]
    assert chat.messages[1]["content"] == first.strip()
    (row,) = generate(
        model, [chat.encode(chat.template(chat.messages))], 6, tokenizer=tokenizer, stop_tokens=()
    )
    assert second == row.text


def test_the_oldest_turns_are_forgotten(tokenizer):
    chat = Chat(body(rope_max_length=160), tokenizer, max_new_tokens=4)
    chat.messages = [{"role": "system", "content": "a"}]
    for _ in range(40):
        reply(chat, "a dog ran to the cat")
        if chat.forgotten:
            break
    assert chat.forgotten > 0 and chat.forgotten % 2 == 0
    roles = [m["role"] for m in chat.messages]
    assert roles[0] == "system" and roles[1] == "user" and roles[-1] == "user"
    before = list(chat.messages)
    with pytest.raises(ValueError, match="text must be at most 160 tokens with its reply, got"):
        chat.say("the cat " * 200)
    assert [m for m in chat.messages if m["role"] == "user"] == [
        m for m in before if m["role"] == "user"
    ]
    assert reply(chat, "a")
