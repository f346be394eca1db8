"""Rows with text: stop strings across tokens, what is held back for them, texts as prompts."""

import itertools
import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from helpers.tokenizers import hugging_face, sentence_piece

from elmkernels import OpenELM, OpenELMConfig, accelerate, generate
from elmkernels.generation.text import RowText
from elmkernels.openelm import Session, Tokenizer, stream

CONFIG = OpenELMConfig(
    num_transformer_layers=2, model_dim=64, head_dim=16, num_gqa_groups=2, ffn_dim_divisor=16,
    vocab_size=300, rope_max_length=128, normalize_qk_projections=True,
    share_input_output_layers=True,
)  # fmt: skip
WRITTEN = " the cat\n\nsat 안녕하세요 on 👩‍👩‍👧 the mat."


@pytest.fixture(
    params=[hugging_face, partial(sentence_piece, exact=True)], ids=["tokenizers", "sentencepiece"]
)
def tokenizer(request, tmp_path) -> Tokenizer:
    return Tokenizer(request.param(tmp_path))


class Writer(OpenELM):
    """A model that writes the given tokens, whatever it is asked."""

    def __init__(self, *texts: list[int]) -> None:
        super().__init__(CONFIG, seed=0)
        self.texts = texts

    def forward(self, input_ids, attention_mask=None, cache=None, logits_to_keep=0, counts=None):
        logits = super().forward(input_ids, attention_mask, cache, logits_to_keep, counts)
        for b, text in enumerate(self.texts):
            at = cache.rows[b] - self.prompted[b]  # after the last of the new tokens
            new = 1 if logits_to_keep else (counts or [input_ids.shape[1]] * len(self.texts))[b]
            for i in range(max(0, new - 1 - at), new):
                place = at - (new - 1 - i)
                where = -1 if logits_to_keep else i
                logits[b, where, text[place] if place < len(text) else 2] = 1e9
        return logits


def written(tokenizer: Tokenizer, *texts: str) -> tuple[Writer, list[list[int]]]:
    """A model that writes texts after the prompt "a", then ends them, and the prompts."""
    start = tokenizer.encode("a")
    whole = [tokenizer.encode("a" + text) for text in texts]
    assert all(ids[: len(start)] == start for ids in whole)
    model = Writer(*(ids[len(start) :] for ids in whole))
    model.prompted = [len(start)] * len(texts)
    return model, [start] * len(texts)


def test_a_row_has_the_text_of_its_tokens(tokenizer):
    model, prompts = written(tokenizer, WRITTEN)
    (row,) = generate(model, prompts, 100, tokenizer=tokenizer)
    assert (row.text, row.finish_reason, row.stopped_by) == (WRITTEN, "stop", 2)
    run = stream(model, prompts, 100, tokenizer=tokenizer)
    pieces = list(run.text())
    assert "".join(pieces) == WRITTEN and all(pieces) and len(pieces) > 10
    assert generate(model, prompts, 100)[0].text is None


STOPS = [
    "cat",
    "t\n",
    "\n\n",
    "\n\ns",
    "녕하",
    "세요 on",
    " o",
    "👩‍👩‍👧",
    "\u200d",
    ".",
    "he c",
    "at.",
]


@pytest.mark.parametrize("stop", STOPS, ids=ascii)
def test_a_stop_string_ends_a_row_wherever_it_lies(tokenizer, stop):
    model, prompts = written(tokenizer, WRITTEN)
    run = stream(model, prompts, 100, tokenizer=tokenizer, stop_strings=stop)
    text = "".join(run.text())
    (row,) = run.rows
    assert text == row.text == WRITTEN[: WRITTEN.index(stop)]
    assert (row.finish_reason, row.stopped_by) == ("stop", stop)
    # Up to the token that completes it, and no further.
    assert stop in tokenizer.continuation(prompts[0], row.tokens)
    assert stop not in tokenizer.continuation(prompts[0], row.tokens[:-1])


@pytest.mark.parametrize("stop", ["sat the", "t\n", "zzz"])
@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_stop_strings_and_pieces_are_the_same_with_a_draft(tokenizer, draft, stop):
    texts = [" the cat sat the cat sat the cat\n\nsat", WRITTEN]
    model, prompts = written(tokenizer, *texts)
    how = {"tokenizer": tokenizer, "stop_strings": stop}
    plain = generate(model, prompts, 60, **how)
    pieces = list(stream(model, prompts, 60, **how).text())
    guessing = written(tokenizer, *texts)[0] if draft == "model" else draft
    run = stream(model, prompts, 60, draft=guessing, draft_tokens=5, **how)
    assert list(run.text()) == pieces and run.rows == plain
    assert run.speculation.accepted > 0


def test_the_first_of_several_stop_strings_counts(tokenizer):
    model, prompts = written(tokenizer, WRITTEN, " the sat", " nothing")
    rows = generate(
        model, prompts, 100, tokenizer=tokenizer, stop_strings=["at", "\n", "xyz", "sat"]
    )
    assert [row.text for row in rows] == [" the c", " the ", " nothing"]
    assert [row.stopped_by for row in rows] == ["at", "sat", 2]


def test_what_never_became_a_stop_string_is_given(tokenizer):
    model, prompts = written(tokenizer, " the cat sa")
    run = stream(model, prompts, 100, tokenizer=tokenizer, stop_strings=["cat sat", "zzz"])
    assert "".join(run.text()) == " the cat sa" and run.rows[0].stopped_by == 2


def test_no_beginning_of_a_stop_string_is_given_out(tokenizer):
    """All short texts over two letters, and every stop string of them: whatever was given out at
    any time is text before the stop."""
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product("ab", repeat=n)]
    draw = random.Random(0)
    start = tokenizer.encode("t")
    for _ in range(300):
        text = "".join(draw.choice("aab") for _ in range(8))
        stops = draw.sample(words, 2)
        row, done = RowText(tokenizer, start, stops), None
        given = ""
        for token in tokenizer.encode("t" + text)[len(start) :]:
            done = row.add(token)
            assert row.text.startswith(given)
            given = row.text
            if done is not None:
                break
        if done is None:
            row.end()
        # The stop string that is complete first, and of two that end together the longer.
        ends = (n for n in range(len(text) + 1) if any(s in text[:n] for s in stops))
        seen = text[: next(ends, len(text))]
        cut = min((i for i in map(seen.find, stops) if i >= 0), default=len(text))
        assert row.text == text[:cut], (text, stops)
        assert (done is None) == (cut == len(text))


def test_a_session_goes_on_after_a_stop_string(tokenizer):
    model, prompts = written(tokenizer, WRITTEN)
    session = Session(model)
    (row,) = session.generate(prompts, 50, tokenizer=tokenizer, stop_strings=["sat"])
    assert row.text == " the cat\n\n" and session.cache.rows[0] <= len(prompts[0] + row.tokens)
    run = session.stream([prompts[0] + row.tokens], 100, tokenizer=tokenizer)
    assert run.reused == [len(prompts[0] + row.tokens) - 1]
    assert "".join(run.text()) == WRITTEN[WRITTEN.index("sat") + 3 :]


def test_prompts_of_text(tokenizer):
    model = OpenELM(CONFIG, seed=5)
    texts = ["the cat", "a dog ran"]
    rows = generate(model, texts, 5, tokenizer=tokenizer)
    ids = [tokenizer.encode(text) for text in texts]
    assert rows == generate(model, ids, 5, tokenizer=tokenizer)
    assert rows == Session(model, 2).generate([texts[0], ids[1]], 5, tokenizer=tokenizer)


def test_an_interruption_gives_the_text_by_then(tokenizer):
    model, prompts = written(tokenizer, WRITTEN)
    run = stream(model, prompts, 100, tokenizer=tokenizer, stop_strings=["\n\nx"])
    while not run.rows[0].text.endswith("cat"):
        next(run)
    next(run)  # a line, which may begin the stop string
    assert run.rows[0].text.endswith("cat")
    run.interrupt()
    assert run.rows[0].text == " the cat\n" and run.rows[0].finish_reason == "interrupted"


def test_it_ends_at_the_checkpoints_own_tokens(tmp_path):
    model = OpenELM(CONFIG, seed=5)
    free = generate(model, [[1, 5, 9]], 30, stop_tokens=())[0].tokens
    wanted = next(token for token in free if token > 2)
    at = free.index(wanted)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for said, generation in (
        ({"eos_token_id": wanted}, None),
        ({"eos_token_id": [299, wanted, 5000]}, None),
        ({}, {"eos_token_id": [wanted]}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | said))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        loaded = OpenELM.from_pretrained(tmp_path)
        for rows in (
            generate(loaded, [[1, 5, 9]], 30),
            generate(loaded, [[1, 5, 9]], 30, stop_tokens=None),
            Session(loaded).generate([[1, 5, 9]], 30),
        ):
            assert rows[0].tokens == free[:at] and rows[0].stopped_by == wanted
        assert generate(loaded, [[1, 5, 9]], 30, stop_tokens=())[0].tokens == free


def test_integers_of_numpy_are_integers():
    model, n = OpenELM(CONFIG, seed=5), np.int64
    (expected,) = generate(model, [[1, 5, 9]], 6, stop_tokens=(3,))
    for prompts in (
        [[n(1), n(5), n(9)]],
        np.array([[1, 5, 9]]),
        [np.array([1, 5, 9])],
        torch.tensor([[1, 5, 9]]),
    ):
        for stops in (n(3), [n(3)], np.array([3]), {3}, torch.tensor([3])):
            assert generate(model, prompts, n(6), stop_tokens=stops, chunk=n(2)) == [expected]
    session = Session(model, n(1), n(32))
    assert session.generate([[1, 5, 9]], n(6), stop_tokens=3) == [expected]
    warm = {"temperature": 1.0, "seed": n(5)}
    session.reset()
    drawn = session.generate([[1, 5, 9]], 6, top_k=n(4), **warm)
    session.reset()
    assert drawn == session.generate([[1, 5, 9]], 6, top_k=4, **warm)
    session.reset()
    assert session.generate([[1, 5, 9]], n(6), stop_tokens=3) == [expected]
    assert all(type(token) is int for token in session.ids[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_strings": ["x"]}, ValueError, "must be given with stop_strings, got None"),
        ({"stop_strings": 5}, TypeError, "stop_strings must be text or a list of texts, got 5"),
        ({"stop_strings": ["a", 5]}, TypeError, "stop_strings must be text or a list of texts"),
        ({"stop_strings": ""}, ValueError, "stop_strings must be of at least one character"),
        ({"tokenizer": "tokenizer.json"}, TypeError, "must be an openelm.Tokenizer .*str"),
        ({"prompts": ["text"]}, ValueError, r"given for a prompt of text \(prompts\[0\]\)"),
        ({"stop_tokens": 2.5}, TypeError, r"stop_tokens must lie in \[0, 300\), got 2.5"),
        ({"stop_tokens": "2"}, TypeError, r"stop_tokens must lie in \[0, 300\), got '2'"),
        ({"stop_tokens": [True]}, ValueError, r"stop_tokens must lie in \[0, 300\), got True"),
        ({"prompts": np.zeros((1, 2))}, ValueError, r"integers \[batch, length\].*float64"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(options, error, message):
    model = OpenELM(CONFIG, device="meta")
    with pytest.raises(error, match=message):
        generate(model, max_new_tokens=4, **{"prompts": [[1]]} | options)


def test_the_text_of_a_stream_without_a_tokenizer():
    run = stream(OpenELM(CONFIG, seed=5), [[1]], 4)
    with pytest.raises(ValueError, match="tokenizer must be given to the stream"):
        run.text()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
def test_nan_ends_a_generation_with_an_error(options, accelerated):
    model = OpenELM(CONFIG, seed=5)
    if accelerated:
        accelerate(model)
    session = Session(model, 2)
    session.generate([[1, 5, 9], [4]], 3, **options)
    with torch.no_grad():
        model.layers[0].ffn.proj_1.weight[3, 5] = float("nan")
    run = session.stream([[1, 5, 9, 3], [4, 7]], 6, **options)
    with pytest.raises(
        ValueError, match="logits must be numbers to choose a token, got NaN in row 0"
    ):
        next(run)
    assert [row.finish_reason for row in run.rows] == ["failed"] * 2
