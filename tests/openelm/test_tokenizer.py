"""Borrowed tokenizers: where they are found, the first token, and text that comes in pieces."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from helpers.tokenizers import hugging_face, sentence_piece

from elmkernels.openelm.tokenizer import TextStream, Tokenizer, find_tokenizer, special_tokens

TEXT = "the cat sät on 猫 \U0001f408"


@pytest.fixture(params=[hugging_face, sentence_piece], ids=["tokenizers", "sentencepiece"])
def tokenizer(request, tmp_path) -> Tokenizer:
    return Tokenizer(request.param(tmp_path))


def test_a_text_begins_with_one_bos_and_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.count(1) == 1 and ids[0] == 1
    assert tokenizer.decode(ids) == TEXT
    assert Tokenizer(tokenizer.path, None).encode(TEXT) == ids[1:]
    assert Tokenizer(tokenizer.path, 2).encode(TEXT) == [2, *ids[1:]]


def test_a_written_bos_is_not_put_twice(tmp_path):
    tokenizer = Tokenizer(hugging_face(tmp_path))
    assert (
        tokenizer.encode("<s>the")
        == tokenizer.encode("<s> the")[:1] + tokenizer.encode("<s>the")[1:]
    )
    assert tokenizer.encode("<s>the").count(1) == 1


def streamed(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    text = TextStream(tokenizer, prompt)
    return [*(text.add(token) for token in tokens), text.end()]


@pytest.mark.parametrize("prompted", [0, 1, 5])
def test_streamed_text_is_the_whole_text(tokenizer, prompted):
    """Spaces and characters of several bytes come out once and whole, at every cut but those
    inside a character, which belongs to what completes it.
    """
    ids = tokenizer.encode(TEXT)
    prompt, tokens = ids[:prompted], ids[prompted:]
    pieces = streamed(tokenizer, prompt, tokens)
    assert tokenizer.decode(prompt).rstrip("\ufffd") + "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.continuation(prompt, tokens) == "".join(pieces)


def test_a_character_cut_by_the_prompt_is_completed(tokenizer):
    ids = tokenizer.encode("a 猫")
    assert len(ids) >= 5  # three bytes at the end
    for cut in (1, 2):
        assert "".join(streamed(tokenizer, ids[:-cut], ids[-cut:])) == "猫"


TEXTS = {
    "Korean": "안녕하세요 hello",
    "Thai": "สวัสดี ครับ",
    "Hindi": "नमस्ते",
    "hearts": "a❤❤❤b",
    "a family of joiners": "the 👩‍👩‍👧 sat",
    "a flag": "🇰🇷🇹🇭 cat",
    "lines": "the cat\n\nsat\n",
    "blanks": "  the  cat   sat",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_script_survives_every_cut(tokenizer, text):
    """Split between a prompt and tokens at any token, inside of characters and of runs of bytes
    which the library decodes all together."""
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert whole.split() == text.split()
    for cut in range(len(ids) + 1):
        pieces = streamed(tokenizer, ids[:cut], ids[cut:])
        prompted = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert prompted + "".join(pieces) == whole, cut
        assert not any("\ufffd" in piece for piece in pieces)
        assert tokenizer.continuation(ids[:cut], ids[cut:]) == "".join(pieces)


def test_streamed_text_is_what_the_library_decodes_of_any_tokens(tokenizer):
    """Broken bytes, bytes amid special and unknown ids, blanks: whatever is decoded of a prompt and
    its tokens together, less the prompt's own text."""
    draw = random.Random(1)
    kinds = (
        lambda: draw.randrange(3, 259),
        lambda: draw.randrange(259, tokenizer.vocab_size),
        lambda: draw.choice([0, 1, 2, 3000]),
        lambda: tokenizer.id_of(["\u2581"]),
    )
    for _ in range(400):
        ids = [draw.choice(kinds)() for _ in range(draw.randrange(1, 60))]
        cut = draw.randrange(len(ids) + 1)
        pieces = streamed(tokenizer, ids[:cut], ids[cut:])
        assert "".join(pieces) == tokenizer.continuation(ids[:cut], ids[cut:]), (ids, cut)
        given = tokenizer.decode(ids[:cut])
        if not given.endswith("\ufffd"):
            assert "".join(pieces) == tokenizer.decode(ids)[len(given) :]


def test_text_goes_out_as_soon_as_it_is_certain(tokenizer):
    text = TextStream(tokenizer, tokenizer.encode("the"))
    for token in tokenizer.encode("the cat sat")[len(tokenizer.encode("the")) :]:
        assert text.add(token) and not text.pending()


@pytest.mark.parametrize("ids", [[5.0], "text", None, [[5]], [True]])
def test_ids_that_are_none(tokenizer, ids):
    with pytest.raises(TypeError, match="ids must be a list of token ids, got"):
        tokenizer.decode(ids)


def test_ids_of_any_integers(tokenizer):
    ids = tokenizer.encode(TEXT)
    for same in (np.array(ids), torch.tensor(ids), tuple(ids), [np.int64(i) for i in ids]):
        assert tokenizer.decode(same) == TEXT
    assert tokenizer.decode([-1, 2**40, *ids]) == TEXT


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [(b"the", TypeError, "must be text, got bytes"), ("a\udcff", ValueError, "whole characters")],
)
def test_texts_that_are_none(tokenizer, text, error, message):
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(error, match=message):
            call(text)


@pytest.mark.parametrize("bos", [-1, 1.0, True, "<s>"])
def test_a_bos_that_is_none(tokenizer, bos):
    with pytest.raises(ValueError, match="bos must be a token id or None, got"):
        Tokenizer(tokenizer.path, bos)


def test_from_pretrained(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)
    hugging_face(tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 2}')
    assert Tokenizer.from_pretrained(tmp_path).bos == 2


def test_any_tokens_come_out_once(tokenizer):
    """Random pieces and characters, special tokens and ids that it doesn't know, far beyond the
    tokens that are decoded together.
    """
    draw = random.Random(0)
    words = [
        tokenizer.encode(text)[1:] for text in (*"abc", "the", " cat", "ä", "猫", "\U0001f408")
    ]
    for _ in range(50):
        tokens = sum((draw.choice([*words, [1], [2], [3000]]) for _ in range(30)), [])
        assert "".join(streamed(tokenizer, [1], tokens)) == tokenizer.decode(tokens)


def test_text_goes_on_after_broken_bytes(tokenizer):
    draw = random.Random(0)
    end = tokenizer.encode("on the mat")[1:]
    for _ in range(50):
        broken = [draw.randrange(3, 259) for _ in range(20)]
        assert "".join(streamed(tokenizer, [1], broken + end)).endswith("on the mat")


def test_end_gives_what_never_became_whole(tokenizer):
    ids = tokenizer.encode("a 猫")
    pieces = streamed(tokenizer, ids[:2], ids[2:-1])
    assert "\ufffd" not in "".join(pieces[:-1]) and "\ufffd" in pieces[-1]


def test_where_a_tokenizer_is_found(tmp_path):
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "weights.pt").touch()
    assert find_tokenizer(None, None) is None
    assert find_tokenizer(None, checkpoint) is None
    for name in ("tokenizer.model", "tokenizer.json"):  # the second is preferred
        file = checkpoint / name
        file.touch()
        for place in (checkpoint, checkpoint / "weights.pt"):
            assert find_tokenizer(None, place) == file
        assert find_tokenizer(checkpoint, None) == find_tokenizer(file, tmp_path) == file
    with pytest.raises(FileNotFoundError, match="a folder with tokenizer.json or .*nowhere"):
        find_tokenizer(tmp_path / "nowhere", checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_no_tokenizer(tmp_path, name):
    pytest.importorskip("tokenizers" if name.endswith("json") else "sentencepiece")
    (tmp_path / name).write_text('{"neither": 1}')
    with pytest.raises(ValueError, match=f"{name} is not a tokenizer"):
        Tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizers", "sentencepiece"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / ("tokenizer.json" if name == "tokenizers" else "tokenizer.model")
    with pytest.raises(ImportError, match=f"pip install {name}"):
        Tokenizer(file)


def test_special_tokens(tmp_path):
    assert special_tokens(None) == (1, [2])
    for values, expected in (
        ({}, (1, [2])),
        ({"bos_token_id": 5, "eos_token_id": [6, 7]}, (5, [6, 7])),
        ({"bos_token_id": None, "eos_token_id": None}, (None, [])),
        ({"bos_token_id": -1, "eos_token_id": [7, 7]}, (None, [7])),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert special_tokens(tmp_path) == expected
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert special_tokens(tmp_path) == (1, [5, 9])
    (tmp_path / "generation_config.json").unlink()
    for values in ({"eos_token_id": "x"}, {"eos_token_id": [1, True]}, {"bos_token_id": -5}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(values))} must be a token"):
            special_tokens(tmp_path)
    (tmp_path / "weights.pt").touch()
    assert special_tokens(tmp_path / "weights.pt") == (1, [2])
