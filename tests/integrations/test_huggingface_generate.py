"""generate of transformers on the kernels and the package's own cache: every way of it gives the
tokens that transformers' eager attention with its own cache gives, in float32.
"""

import inspect

import pytest
import torch
from helpers.golden import load_hf_tiny
from helpers.transformers_models import APPLE, eager, ids, left_padded, wrapped

pytest.importorskip("transformers")

import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import elmkernels
from elmkernels.generation import step

NEW = 12
# How `generate` is asked, and with how many rows.
WAYS = {
    "greedy": (1, {}),
    "greedy, 3 rows": (3, {}),
    "greedy, more rows than one call takes": (9, {}),
    "sampling": (3, {"do_sample": True, "top_k": 20, "temperature": 0.8}),
    "sampling, top_p": (2, {"do_sample": True, "top_p": 0.9}),
    "beams": (2, {"num_beams": 3}),
    "beams that sample": (2, {"num_beams": 3, "do_sample": True}),
    "beams, all returned": (1, {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True}),
    "several samples": (2, {"do_sample": True, "num_return_sequences": 3}),
    "penalties": (2, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "a prompt in chunks": (2, {"prefill_chunk_size": 4}),
    "no cache": (2, {"use_cache": False}),
    "transformers' own cache": (2, {"cache_implementation": "dynamic"}),
    "a static cache": (2, {"cache_implementation": "static"}),
    "an early end": (3, {"eos_token_id": list(range(4, 40)), "pad_token_id": 0}),
}


def said(model, prompt, seed=7, **options):
    transformers.set_seed(seed)
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    return model.generate(prompt, **options).tolist()


@pytest.fixture(scope="module")
def ours():
    return wrapped("auto")


@pytest.fixture(scope="module")
def theirs():
    return eager()


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_eager(way, ours, theirs):
    rows, options = WAYS[way]
    assert said(ours, ids(rows, 9), **options) == said(theirs, ids(rows, 9), **options)


PADDED = ["greedy", "sampling", "beams", "penalties", "a static cache", "transformers' own cache",
          "a prompt in chunks", "no cache", "an early end"]  # fmt: skip


@pytest.mark.parametrize("way", PADDED)
def test_padded_batches(way, ours, theirs):
    prompt, mask = left_padded([3, 9, 6])
    options = WAYS[way][1] | {"attention_mask": mask}
    assert said(ours, prompt, **options) == said(theirs, prompt, **options)


def test_a_padded_batch_gives_what_its_rows_give_alone(ours):
    prompt, mask = left_padded([4, 9, 7])
    together = ours.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, real in enumerate((4, 9, 7)):
        alone = ours.generate(
            prompt[row : row + 1, 9 - real :], max_new_tokens=NEW, do_sample=False
        )
        assert together[row, 9 - real :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("rows", [1, 8])
def test_every_token_after_the_prompt_is_one_call(rows, ours, monkeypatch):
    """Padded or not: `decode_step` runs all layers, no layer is called."""
    calls = []
    real = step.ops.decode_step
    monkeypatch.setattr(
        step.ops, "decode_step", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    prompt, mask = left_padded([9 - i for i in range(rows)])
    ours.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert len(calls) == NEW - 1


def test_no_mask_reaches_attention(ours, monkeypatch):
    seen = []
    from elmkernels.acceleration import fused

    real = fused.ops.attention
    monkeypatch.setattr(
        fused.ops, "attention", lambda *a, **k: (seen.append(k.get("key_mask")), real(*a, **k))[1]
    )
    prompt, mask = left_padded([3, 9])
    ours.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False)
    right = torch.ones(2, 8).long()
    right[0, 5:] = 0
    for given in (right, torch.ones(2, 8)):
        ours(ids(2, 8), attention_mask=given, use_cache=False)
        with torch.no_grad():
            ours(ids(2, 8), attention_mask=given)
    assert seen and set(map(type, seen)) == {type(None)}


def test_generate_of_the_package_says_the_same(ours):
    prompt = ids(3, 9)
    rows = elmkernels.generate(ours.transformer, prompt, NEW)
    got = ours.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert got[:, 9:].tolist() == [row.tokens for row in rows]


def test_golden_tokens():
    golden = load_hf_tiny().tensors
    model = AutoModelForCausalLM.from_pretrained(APPLE)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = golden["greedy_9_plus_24"]
    assert torch.equal(model.generate(greedy[:, :9], max_new_tokens=24, **options), greedy)
    padded, mask, expected = (golden[f"padded_{n}"] for n in ("ids", "mask", "greedy"))
    more = expected.shape[1] - padded.shape[1]
    got = model.generate(padded, attention_mask=mask, max_new_tokens=more, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("assistant", ["ours", "eager"])
def test_assisted_decoding(assistant, ours, theirs):
    small = wrapped("auto", seed=5) if assistant == "ours" else eager(seed=5)
    expected = said(theirs, ids(1, 9))
    assert said(ours, ids(1, 9), assistant_model=small) == expected


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guesses_are_checked_in_one_call(way, dtype, monkeypatch):
    """By `decode_step`, so that tokens are those of plain decoding in bfloat16 too."""
    model, same = wrapped("auto", dtype), wrapped("auto", dtype)
    prompt = ids(1, 9).repeat(1, 2)
    plain = said(model, prompt)
    options = {"prompt_lookup_num_tokens": 4} if way == "prompt lookup" else {}
    if way == "assistant":
        same.generation_config.num_assistant_tokens = 4
        same.generation_config.num_assistant_tokens_schedule = "constant"
        same.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": same}
    called = []
    decode_step = step.ops.decode_step

    def noted(weights, tokens, *args, **kwargs):
        called.append(len(tokens))
        return decode_step(weights, tokens, *args, **kwargs)

    monkeypatch.setattr(step.ops, "decode_step", noted)
    assert said(model, prompt, **options) == plain
    assert max(called) > 1, called
    if way == "assistant":  # all that it guesses is kept
        assert 5 in called


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (
            {},
            {"num_beams": 2},
            "assistant_model must be None with beams .num_beams 2., .* got Open",
        ),
        (None, {"num_beams": 2}, "prompt_lookup_num_tokens must be None with beams .* got 3"),
        (
            {"vocab_size": 300},
            {},
            "assistant_model must be of .* vocabulary of 320 tokens .* got 300",
        ),
        (
            {"rope_max_length": 16, "max_context_length": 16},
            {},
            f"assistant_model must be of at least {9 + NEW} positions .* got 16",
        ),
    ],
)
def test_assistants_that_do_not_fit(values, options, words):
    model = wrapped("auto")
    guessing = {"prompt_lookup_num_tokens": 3}
    if values is not None:
        guessing = {"assistant_model": wrapped("auto", **values)}
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=words):
        said(model, ids(1, 9), **guessing, **options)


def test_embeddings_instead_of_ids(ours, theirs):
    embedded = ours.get_input_embeddings()(ids(2, 9)).detach()
    got = ours.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    expected = theirs.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert got.tolist() == expected.tolist()


def test_scores_and_states_come_along(ours, theirs):
    options = dict(
        max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    prompt, mask = left_padded([5, 9])
    got, expected = (m.generate(prompt, attention_mask=mask, **options) for m in (ours, theirs))
    assert got.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(got.logits + got.scores, expected.logits + expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert len(a) == len(b) == 4
        for x, y in zip(a, b, strict=True):
            real = mask.bool() if x.shape[1] == 9 else torch.ones(2, 1).bool()
            torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-4)


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_stopping_criteria_and_streamers(ours):
    options = {"max_new_tokens": NEW, "do_sample": False}
    criteria = transformers.StoppingCriteriaList([AfterThree()])
    assert ours.generate(ids(1, 9), stopping_criteria=criteria, **options).shape[1] == 12
    streamer = Collected()
    whole = ours.generate(ids(1, 9), streamer=streamer, **options)
    assert streamer.tokens == whole[0].tolist() and streamer.ended


def test_stop_strings(tmp_path):
    from helpers.tokenizers import hugging_face
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(hugging_face(tmp_path)))
    model = wrapped("auto", vocab_size=290)
    with torch.no_grad():  # letters alone: of the bytes most are no text
        head = torch.zeros(290)
        head[260:] = 1
        model.transformer.token_embeddings.weight.mul_(head[:, None])
    prompt = torch.tensor([[265, 270, 275]])
    whole = model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0].tolist()
    stop = tokenizer.decode(whole[6:7]).strip() or tokenizer.decode(whole[7:8]).strip()
    ended = model.generate(
        prompt, max_new_tokens=NEW, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )[0].tolist()
    assert ended == whole[: len(ended)] and 3 < len(ended) < len(whole)
    assert stop in tokenizer.decode(ended[3:]) and stop not in tokenizer.decode(ended[3:-1])


@pytest.mark.parametrize("way", ["prompt lookup", "beams", "several samples", "a static cache"])
def test_ways_together_with_streams_of_ends(way, ours, theirs):
    """Early ends, penalties and a criterion on top of them."""
    rows, options = WAYS[way]
    ends = {"eos_token_id": list(range(4, 30)), "pad_token_id": 0, "repetition_penalty": 1.2}
    found = []
    for model in (ours, theirs):
        criteria = transformers.StoppingCriteriaList([AfterThree()])
        found.append(said(model, ids(rows, 9), stopping_criteria=criteria, **options, **ends))
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{"num_assistant_tokens": 2}, {"do_sample": True}])
def test_assistants_that_are_often_wrong(options, ours, theirs):
    """What an assistant proposed and the model refused is cropped from both caches."""
    small = {m: wrapped(k, seed=5) for m, k in ((ours, "auto"), (theirs, None))}
    found = [said(m, ids(1, 9), assistant_model=small[m], **options) for m in (ours, theirs)]
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [1, 3])
def test_several_sequences_of_padded_prompts(rows, ours, theirs):
    prompt, mask = left_padded([9, 4, 6][:rows])
    for options in (
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
        {"num_beams": 3, "num_return_sequences": 3},
    ):
        given = options | {"attention_mask": mask}
        assert said(ours, prompt, **given) == said(theirs, prompt, **given)


def one_by_one(model, prompt, penalty, top_k, new):
    """Contrastive search of a row by its formula: each candidate in a pass of its own, no cache."""
    row = prompt.tolist()
    for _ in range(new):
        out = model(torch.tensor([row]), output_hidden_states=True, use_cache=False)
        before = out.hidden_states[-1][0]
        chances, tokens = out.logits[0, -1].softmax(-1).topk(top_k)
        scores = []
        for chance, token in zip(chances, tokens.tolist(), strict=True):
            there = torch.tensor([[*row, token]])
            now = model(there, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
            likeness = torch.cosine_similarity(now[None], before).max()
            scores.append((1 - penalty) * chance - penalty * likeness)
        row.append(tokens[torch.stack(scores).argmax()].item())
    return row


CONTRASTIVE = {"penalty_alpha": 0.6, "top_k": 4}


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "dynamic"}])
def test_contrastive_search(rows, cache, ours, theirs):
    expected = [one_by_one(theirs, row, 0.6, 4, NEW) for row in ids(rows, 9)]
    for model in (ours, theirs):
        assert said(model, ids(rows, 9), **CONTRASTIVE, **cache) == expected
    config = GenerationConfig(**CONTRASTIVE, max_new_tokens=NEW, pad_token_id=0)
    assert ours.generate(ids(rows, 9), config).tolist() == expected
    assert expected != said(ours, ids(rows, 9))


@torch.no_grad()
def test_contrastive_search_of_padded_rows_that_end(ours, theirs):
    prompt, mask = left_padded([4, 9, 7])
    given = CONTRASTIVE | {"attention_mask": mask}
    expected = [one_by_one(theirs, p[p > 0], 0.6, 4, NEW)[-NEW:] for p in prompt]
    got = [said(model, prompt, **given) for model in (ours, theirs)]
    assert [row[9:] for row in got[0]] == expected and got[0] == got[1]
    end = expected[0][2]
    ended = said(ours, prompt, **given, eos_token_id=[end], repetition_penalty=1.0)
    assert ended[0][9:] == expected[0][:3] + [0] * (len(ended[0]) - 12)
    streamer = Collected()
    out = ours.generate(
        prompt[1:2], **CONTRASTIVE, max_new_tokens=NEW, streamer=streamer, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert streamer.tokens == out.sequences[0].tolist() and streamer.ended
    assert len(out.scores) == NEW and out.sequences[0, 9:].tolist() == expected[1]
    with pytest.raises(ValueError, match="use_cache must be True for contrastive search"):
        said(ours, prompt, **given, use_cache=False)


def by_hand(model, input_ids, **kwargs):
    """Twice the likeliest token."""
    for _ in range(2):
        out = model(input_ids, use_cache=False)
        input_ids = torch.cat((input_ids, out.logits[:, -1:].argmax(-1)), dim=1)
    return input_ids


@torch.no_grad()
def test_a_loop_of_ones_own(ours, theirs, tmp_path):
    """A function, or a folder that holds one."""
    expected = said(theirs, ids(2, 9), max_new_tokens=2)
    assert said(ours, ids(2, 9), custom_generate=by_hand) == expected
    code = ["import torch", inspect.getsource(by_hand).replace("by_hand", "generate")]
    folder = tmp_path / "loop"
    (folder / "custom_generate").mkdir(parents=True)
    code = "\n".join(code).replace("(model, input_ids, ", "(model, inputs, ")
    code = code.replace("input_ids", "inputs")
    (folder / "custom_generate/generate.py").write_text(code)
    given = {"custom_generate": str(folder), "trust_remote_code": True}
    assert said(ours, ids(2, 9), **given) == expected


def test_continuous_batching_says_why_not(ours):
    with pytest.raises(NotImplementedError, match="one number of key/value heads for all layers"):
        ours.generate_batch([[1, 2, 3]])


BAD = {
    "neither": ({}, "input_ids must be given, or inputs_embeds, and not both, got neither"),
    "both": ({"input_ids": ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 128)}, "got both"),
    "a wide id": ({"input_ids": torch.tensor([[1, 320]])}, r"must lie in \[0, 320\)"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 64)}, r"inputs_embeds must be \[batch"),
    "labels": ({"input_ids": ids(1, 3), "labels": ids(1, 4)}, r"labels must be \[1, 3\] like"),
    "a mask": (
        {"input_ids": ids(1, 3), "attention_mask": torch.ones(1, 4)}, "attention_mask must be"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_arguments_are_checked(kind, ours):
    arguments, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        ours(**arguments)
