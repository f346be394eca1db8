"""Drafts: text and seeds stay those of plain decoding, whatever is guessed; what stays behind."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.golden import load_hf_tiny

from elmkernels.checks import is_integer
from elmkernels.generation import speculation
from elmkernels.generation.drafts import ModelDraft, self_draft
from elmkernels.generation.sampling import Sampler, Sampling, warp
from elmkernels.openelm import OpenELM, OpenELMConfig, Session, accelerate, generate, stream

RAGGED = [[5, 4, 3, 2, 1], [7] * 17, [300], [9, 8, 7]]
SAMPLED = {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3}
CHOICES = {
    "greedy": {},
    "penalized": {"repetition_penalty": 1.3},
    "drawn": {"temperature": 1.0, "seed": 5},
    "sampled": SAMPLED,
}
# Layers of 270M's widths, fewer of them.
WIDE = OpenELMConfig(
    num_transformer_layers=2, model_dim=1280, head_dim=64, num_gqa_groups=4, vocab_size=512,
    qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 4.0), ffn_dim_divisor=256,
    normalize_qk_projections=True, share_input_output_layers=True, rope_max_length=256,
    max_context_length=128,
)  # fmt: skip


def tiny(dtype: torch.dtype = torch.float32, fast: bool = True) -> OpenELM:
    model = load_hf_tiny().model().to(dtype)
    if fast:
        accelerate(model)
    return model


@pytest.fixture(scope="module", params=["eager", "accelerated"])
def model(request) -> OpenELM:
    return tiny(fast=request.param == "accelerated")


def other(seed: int = 7) -> OpenELM:
    """A model of the tiny one's vocabulary that says something else."""
    return accelerated(OpenELM(tiny(fast=False).config, seed=seed))


def accelerated(model: OpenELM) -> OpenELM:
    accelerate(model)
    return model


def drafts(model: OpenELM) -> dict:
    return {"lookup": "lookup", "self": "self", "same": model, "other": other()}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["lookup", "self", "same", "other"])
def test_text_and_seeds_stay(model, name, choice):
    plain = generate(model, RAGGED, 20, **CHOICES[choice])
    draft = drafts(model)[name]
    for tokens in (1, 3, 7, None):
        run = stream(model, RAGGED, 20, draft=draft, draft_tokens=tokens, **CHOICES[choice])
        steps = list(run)
        assert run.rows == plain
        assert [[step[b] for step in steps] for b in range(4)] == [row.tokens for row in plain]
        counts = run.speculation
        assert counts is not None and counts.accepted <= counts.guessed
        if name == "same" and tokens is not None:
            assert counts.acceptance == 1 and counts.passes < 19
    own = dict(CHOICES[choice])
    if "seed" in own:  # row b draws from seed + b
        own["seed"] += 1
    assert generate(model, RAGGED[1:2], 20, draft=draft, draft_tokens=4, **own) == plain[1:2]


@pytest.mark.parametrize("form", ["tiny", "wide"])
def test_bfloat16_is_equal_to_the_token(form):
    """Of weights that agree with their copy often enough for some guesses to be kept."""
    if form == "tiny":
        model = tiny(torch.bfloat16)
    else:
        model = OpenELM(WIDE, seed=0, dtype=torch.bfloat16)
        with torch.no_grad():
            model.token_embeddings.weight.mul_(3)  # wider gaps between logits
        accelerate(model)
    prompts = [[5, 4, 3, 2, 1], [7] * 9]
    plain = generate(model, prompts, 24)
    kept = 0
    for draft in ("lookup", "self"):
        for tokens in (2, 7):
            run = stream(model, prompts[:1], 24, draft=draft, draft_tokens=tokens)
            list(run)
            assert run.rows == plain[:1]
            kept += run.speculation.accepted
            assert generate(model, prompts, 24, draft=draft, draft_tokens=tokens) == plain
    assert kept


def test_more_rows_than_one_call_takes(model):
    prompts = [[b + 1, 2, 3][: 1 + b % 3] for b in range(10)]
    plain = generate(model, prompts, 9)
    assert generate(model, prompts, 9, draft="self", draft_tokens=3) == plain
    assert generate(model, prompts[:8], 9, draft=model, draft_tokens=3) == plain[:8]


@pytest.mark.parametrize("draft", ["lookup", "self", "same"])
def test_stop_tokens_and_what_follows(model, draft):
    draft = drafts(model)[draft]
    free = generate(model, RAGGED, 16)
    for stop in (free[1].tokens[4], free[0].tokens[0], free[3].tokens[7]):
        plain = generate(model, RAGGED, 16, stop_tokens=stop)
        assert generate(model, RAGGED, 16, stop_tokens=stop, draft=draft, draft_tokens=5) == plain


@pytest.mark.parametrize("draft", ["lookup", "self", "same"])
def test_sessions_keep_what_they_read(model, draft):
    """Prefixes are reused, the caches agree, and rejected tokens leave no trace."""
    draft = drafts(model)[draft]
    session = Session(model, 2, 96, draft=draft, draft_tokens=3)
    plain = Session(model, 2, 96)
    prompts = [[1, 2, 3, 4], [9, 8]]
    for more in ([5], [6, 7], [], [11] * 5):
        prompts = [prompt + more for prompt in prompts]
        run, other_run = session.stream(prompts, 9), plain.stream(prompts, 9)
        list(run), list(other_run)
        assert run.rows == other_run.rows and run.reused == other_run.reused
        lengths = [len(p) + len(r.tokens) for p, r in zip(prompts, run.rows, strict=True)]
        for held, most in zip(session.cache.rows, lengths, strict=True):
            assert held <= most
        for layer in range(len(session.cache.k)):
            for b, held in enumerate(session.cache.rows):
                if held <= plain.cache.rows[b]:
                    ours = session.cache.k[layer][b, :held]
                    torch.testing.assert_close(ours, plain.cache.k[layer][b, :held])
        prompts = [p + r.tokens for p, r in zip(prompts, run.rows, strict=True)]
    shorter = [prompt[:5] for prompt in prompts]
    assert session.generate(shorter, 6) == plain.generate(shorter, 6)


@pytest.mark.parametrize("where", ["draft", "check", "truncate", "prompt"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interruption_leaves_both_caches_usable(monkeypatch, where, at):
    model = tiny()
    draft = other()
    prompts = [[1, 2, 3, 4], [9, 8]]
    session = Session(model, 2, 64, draft=draft, draft_tokens=2)
    session.generate(prompts, 5)
    whole = generate(model, [[*p, 7] for p in prompts], 12)
    calls = 0

    def interrupting(call):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            done = call(*args, **kwargs) if where == "truncate" or calls != at else None
            if calls == at:
                raise KeyboardInterrupt
            return done

        return wrapped

    place = {
        "draft": (ModelDraft, "_go_on"),
        "check": (speculation, "several_greedy"),
        "truncate": (type(session.cache), "truncate"),
        "prompt": (ModelDraft, "_caught_up"),
    }[where]
    with monkeypatch.context() as patched:
        patched.setattr(*place, interrupting(getattr(*place)))
        try:
            run = session.stream([[*p, 7] for p in prompts], 12)
            list(run)
        except KeyboardInterrupt:  # while the stream was made
            run = None
    if run is not None and calls >= at:
        assert run.interrupted
        for row, all_of_it in zip(run.rows, whole, strict=True):
            assert row.tokens == all_of_it.tokens[: len(row.tokens)]
    assert session.generate([[*p, 7] for p in prompts], 12) == whole


def test_the_draft_is_told_what_was_kept():
    """Its cache holds the rows' own tokens, at the same positions, and little is read again."""
    model, draft = tiny(), other()
    read = 0
    handle = draft.layers[0].register_forward_pre_hook(lambda _, args: count(args[0]))

    def count(x):
        nonlocal read
        read += x.shape[0] * x.shape[1]

    session = Session(model, 1, 64, draft=draft, draft_tokens=2)
    (row,) = session.generate([[1, 2, 3, 4, 5]], 20)
    handle.remove()
    made, _ = session.drafting()
    truth = [1, 2, 3, 4, 5, *row.tokens]
    kept = made._kept(0, truth)
    assert made.ids[0][:kept] == truth[:kept] and kept >= 20
    assert read < 4 * 25


@torch.no_grad()
def test_a_draft_that_reads_a_few_tokens_or_all():
    model = tiny()
    ids = [[3, 1, 4, 1, 5, 9, 2, 6] * 4, [2, 7, 1, 8] * 6]
    draft = ModelDraft("draft", model, 2, 64, 512)
    expected = [row.tokens for row in generate(model, ids, 3)]
    short = [row.tokens for row in generate(model, [row[-8:] for row in ids], 3)]

    def guesses(rows: list[int]) -> list[list[int]]:
        return draft.propose(ids, rows, lambda kind, row: 3, None)

    draft.whole = False
    assert guesses([0, 1]) == short and max(draft.cache.rows) <= 10
    assert draft.missed(ids, [0, 1]) == 0
    draft.whole = True
    assert guesses([0, 1]) == expected and draft.cache.rows == [34, 26]
    draft.whole = False
    draft.begin()
    ids = [row[:6] for row in ids]  # shorter than what was left out before
    for whole in (False, True):
        draft.whole = whole
        assert guesses([1]) == [[], generate(model, ids[1:], 3)[0].tokens]
    assert draft.missed(ids, [0, 1]) == 0


def test_the_copy_of_itself():
    model = tiny(torch.bfloat16)
    copy = self_draft(model)
    assert copy is self_draft(model) and copy is not model
    matrices = [p for p in model.parameters() if p.dim() == 2]
    shared = {p.data_ptr() for p in model.parameters()}
    own = sum(t.nbytes for t in [*copy.parameters(), *copy.buffers()] if t.data_ptr() not in shared)
    assert own <= 0.35 * sum(p.numel() * 2 for p in matrices)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert self_draft(model) is not copy
    ids = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(copy(ids)).all()


def test_the_copy_of_compressed_models():
    from elmkernels.openelm import pack, quantize

    for change in (pack, lambda m: quantize(m, 8, progress=False)):
        model = tiny(torch.bfloat16)
        change(model)
        plain = generate(model, RAGGED[:2], 12)
        assert generate(model, RAGGED[:2], 12, draft="self", draft_tokens=3) == plain


# Each option alone, then all: the distribution of what is emitted is the model's.
WAYS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.7},
    "all": {"temperature": 1.2, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.4},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_drawn_has_the_models_distribution(way):
    """120,000 rows of a vocabulary of 12: of each the token after a guess that a draft of another
    distribution drew, kept or not; chi-square against p, over guesses that were kept and were not.
    """
    rows, size, options = 120_000, 12, WAYS[way]
    generator = torch.Generator().manual_seed(17)
    target, draft = (torch.randn(size, generator=generator) * 1.5 for _ in range(2))
    draft = 0.7 * target + 0.3 * draft
    held = [[0, 3]] * rows
    sampler = Sampler(Sampling(seed=23, **options), held, size, torch.device("cpu"), 2)
    choices = [(b, 1) for b in range(rows)]
    none = [()] * rows
    guesses = sampler.at(draft.expand(rows, -1), choices, none)
    chosen = sampler.at(target.expand(rows, -1), choices, none)
    logits = target[None].float()
    if (penalty := options.get("repetition_penalty", 1.0)) != 1:
        seen = torch.zeros(1, size, dtype=torch.bool)
        seen[0, [0, 3]] = True
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    p = warp(logits, options["temperature"], options.get("top_k"), options.get("top_p"))
    p = p.softmax(-1, dtype=torch.float64)[0]
    kept = (guesses == chosen).double().mean().item()
    assert 0.2 < kept < 0.99, "both paths are taken"
    counts = chosen.bincount(minlength=size).double()
    assert not counts[p == 0].any()
    expected = p[p > 0] * rows
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    # 5 standard deviations of the normal approximation of its cube root (Wilson and Hilferty).
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit
    wrong = draft.softmax(-1, dtype=torch.float64)[p > 0] * rows
    assert ((counts[p > 0] - wrong) ** 2 / wrong).sum().item() > limit, "the test can fail"


def test_rows_of_a_small_vocabulary_have_the_models_distribution():
    """The same through `generate`: two tokens of many rows, guessed by another model."""
    config = OpenELMConfig(
        num_transformer_layers=1, model_dim=32, head_dim=16, num_gqa_groups=1, vocab_size=6,
        qkv_multipliers=1.0, ffn_multipliers=(1.0,), ffn_dim_divisor=16,
        normalize_qk_projections=True, share_input_output_layers=True, rope_max_length=16,
        max_context_length=16,
    )  # fmt: skip
    model, draft = (OpenELM(config, seed=seed) for seed in (0, 1))
    options = {"temperature": 1.5, "seed": 9, "stop_tokens": ()}
    prompts = [[1, 2]] * 2000
    rows = generate(model, prompts, 3, draft=draft, draft_tokens=2, **options)
    assert rows == generate(model, prompts, 3, **options)
    with torch.inference_mode():
        p = (model(torch.tensor([[1, 2]]))[0, -1] / 1.5).softmax(-1).double()
    counts = torch.tensor([row.tokens[0] for row in rows]).bincount(minlength=6)
    chi = ((counts - p * 2000) ** 2 / (p * 2000)).sum().item()
    assert chi < 35


def test_nan_is_an_error_in_both(model):
    broken = tiny()
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN in row 0"):
        generate(broken, [[1, 2]], 5, draft="lookup")
    # A draft that gives NaN guesses nothing of use.
    assert generate(tiny(), [[1, 2]], 9, draft=broken, draft_tokens=3) == generate(
        tiny(), [[1, 2]], 9
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"draft": "selves"},
            ValueError,
            "draft must be 'lookup', 'self' or a model, got 'selves'",
        ),
        ({"draft": 3}, TypeError, "draft must be .* got int"),
        ({"draft_tokens": 4}, ValueError, "draft_tokens must be None without a draft, got 4"),
        ({"draft": "lookup", "draft_tokens": 0}, ValueError, "draft_tokens must be .* got 0"),
        ({"draft": "lookup", "draft_tokens": 2.5}, ValueError, "draft_tokens must be .* got 2.5"),
        ({"draft": "lookup", "decode_mode": "graph"}, ValueError, "decode_mode must be None or"),
    ],
)
def test_bad_arguments(model, options, error, words):
    with pytest.raises(error, match=words):
        generate(model, [[1, 2]], 5, **options)


def test_a_draft_that_does_not_fit(model):
    small = OpenELM(WIDE, seed=0)
    with pytest.raises(ValueError, match=rf"{model.config.vocab_size} tokens, got 512"):
        generate(model, [[1, 2]], 5, draft=small)
    short = OpenELM(replace(model.config, rope_max_length=16, max_context_length=16), seed=0)
    with pytest.raises(ValueError, match="at least 21 positions .* got 16"):
        generate(model, [[1]], 20, draft=short)
    assert generate(model, [[1]], 15, draft=short) == generate(model, [[1]], 15)
    with pytest.raises(ValueError, match="draft must be a model of at least"):
        Session(model, draft=short)
    full = Session(model, 1, 8, draft="lookup")
    with pytest.raises(ValueError, match=r"must fit 8 tokens \(the cache's max_length\)"):
        full.generate([[1, 2, 3]], 6)
    assert full.generate([[1, 2, 3]], 5) == generate(model, [[1, 2, 3]], 5)


def test_results_are_plain_values(model):
    run = stream(model, [[1, 2, 3]], 12, draft=model, draft_tokens=3)
    list(run)
    found = run.speculation.results()
    assert found["draft"] == "draft" and found["acceptance"] == 1.0
    assert found["tokens_per_pass"] == found["tokens"] / found["passes"] > 2
    assert all(is_integer(found[name]) for name in ("guessed", "accepted", "passes", "checks"))
    assert stream(model, [[1]], 2).speculation is None
