"""Log-likelihoods are those of whole passes over each request alone, whatever is shared."""

import random

import pytest
import torch
from helpers.transformers_models import VOCABULARY, body

import elmkernels
from elmkernels.evaluation import Request, Score, log_likelihoods
from elmkernels.evaluation.sharing import plan
from elmkernels.openelm import OpenELM

CLOSE = 2e-4  # of sums of some dozen float32 logarithms


@torch.no_grad()
def alone(model: OpenELM, request: Request) -> Score:
    """By the definition: one pass, all logits."""
    ids, start = torch.tensor([request.ids]), request.start
    logits = model(ids[:, :-1])[0].float() if ids.shape[1] > 1 else torch.zeros(0, VOCABULARY)
    asked, targets = logits[start - 1 :], ids[0, start:]
    found = asked.log_softmax(-1).gather(-1, targets[:, None]).double().sum()
    return Score(float(found), bool((asked.argmax(-1) == targets).all()))


def draw(seed: int, *lengths: int) -> tuple[int, ...]:
    drawn = random.Random(f"{seed} {lengths}")
    return tuple(drawn.randrange(4, VOCABULARY) for _ in range(sum(lengths)))


def choices(count: int = 5, begin: int = 21) -> list[Request]:
    """Questions with four choices of different lengths."""
    found = []
    for q in range(count):
        context = (1, *draw(q, begin + q))
        found += [
            Request(context + draw(100 + 4 * q + i, 1 + 3 * i), len(context)) for i in range(4)
        ]
    return found


def one_token() -> list[Request]:
    """Several choices of one token each after the same context, as of letters."""
    context = (1, *draw(0, 30))
    return [Request((*context, token), len(context)) for token in (5, 6, 7, 8)]


def examples() -> list[Request]:
    """Questions behind the same examples, which are a stem."""
    shots = (1, *draw(7, 60))
    return [Request(shots + r.ids[1:], len(shots) + r.start - 1) for r in choices(6, 9)]


def endings() -> list[Request]:
    """Different beginnings of one ending, as of two readings of a sentence."""
    start, end = (1, *draw(3, 12)), draw(4, 9)
    found = []
    for i in range(2):
        context = start + draw(50 + i, 2)
        found.append(Request(context + end, len(context)))
    return found


def nested() -> list[Request]:
    """Each is the beginning of the next; what is asked for lies in what they share."""
    ids = (1, *draw(5, 40))
    return [Request(ids[:n], start) for n in (2, 9, 17, 41) for start in (1, n - 1)]


def nothing_asked() -> list[Request]:
    return [Request((1, 5, 6), 3), Request((1,), 1), Request((1, 5, 6), 2)]


KINDS = {
    "choices": choices(), "one token": one_token(), "examples": examples(), "endings": endings(),
    "nested": nested(), "nothing asked for": nothing_asked(), "alone": [Request((1, 9, 4), 1)],
    "all": choices() + one_token() + examples() + endings() + nested(), "none": [],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("budget", [1, 100, None])
def test_scores_are_those_of_a_pass_each(kind, accelerated, budget):
    model, requests = body(), KINDS[kind]
    expected = [alone(model, request) for request in requests]
    if accelerated:
        elmkernels.accelerate(model)
    got = log_likelihoods(model, requests, budget=budget)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert abs(a.logprob - b.logprob) < CLOSE and a.greedy == b.greedy


def greedy_request(model: OpenELM) -> Request:
    ids = [1, 9, 30]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return Request(tuple(ids), 3)


def test_greedy_is_said_of_what_the_model_would_write():
    model = body()
    right = greedy_request(model)
    wrong = Request((*right.ids[:-1], right.ids[-1] ^ 1), 3)
    scores = log_likelihoods(model, [right, wrong, Request(right.ids, 8)])
    assert [score.greedy for score in scores] == [True, False, True]


@pytest.mark.parametrize("values", [{"share_input_output_layers": False}, {"ffn_with_glu": False}])
def test_other_shapes(values):
    model = body(**values)
    expected = [alone(model, request) for request in choices()]
    elmkernels.accelerate(model)
    got = log_likelihoods(model, choices())
    assert all(abs(a.logprob - b.logprob) < CLOSE for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", ["packed12", "8 bits"])
def test_compressed_weights(form):
    model = body(torch.bfloat16)
    if form == "packed12":
        elmkernels.pack(model, progress=False)
    else:
        elmkernels.quantize(model, bits=8, group_size=32, progress=False)
    requests = choices(2)
    expected = [alone(model, request) for request in requests]
    got = log_likelihoods(model, requests)
    # bfloat16's own steps; other batches round elsewhere.
    assert all(abs(a.logprob - b.logprob) < 0.5 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("budget", [1, 64, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_each_request_once(kind, budget):
    requests = KINDS[kind]
    units = plan(requests, budget)
    assert sorted(r for unit in units for r in unit.requests) == list(range(len(requests)))
    for unit in units:
        for branch in unit.branches:
            for leaf in branch.leaves:
                for r in leaf.requests:
                    ids, start = requests[r]
                    assert (unit.stem + branch.tokens + leaf.tokens) == ids[:-1]
                    assert len(unit.stem) < max(start, 1)


def computed(requests: list[Request]) -> int:
    """Tokens that go through the model, without padding."""
    units = plan(requests, 10_000)
    stems = {unit.stem for unit in units}
    own = sum(len(b.tokens) + b.rest for unit in units for b in unit.branches)
    return sum(map(len, stems)) + own


def test_beginnings_are_computed_once():
    requests = choices(5)
    whole = sum(len(r.ids) - 1 for r in requests)
    contexts = sum(r.start for r in requests[::4])
    rest = sum(len(r.ids) - 1 - r.start for r in requests)
    assert computed(requests) == contexts + rest < 0.5 * whole
    assert computed(one_token()) == 31
    behind = examples()
    assert {len(unit.stem) for unit in plan(behind, 10_000)} == {61}
    assert computed(behind) <= 61 + sum(len(r.ids) - 1 - 61 for r in behind)


def test_questions_are_computed_together():
    assert len(plan(choices(20), 100_000)) == 1
    assert len(plan(choices(20), 500)) < 10
    assert len(plan(examples(), 100_000)) == 1


def test_a_plan_depends_on_the_requests_alone():
    assert plan(KINDS["all"], 100) == plan(list(KINDS["all"]), 100)


def test_progress_is_told():
    told = []
    log_likelihoods(body(), choices(), budget=100, progress=lambda *n: told.append(n))
    assert len(told) > 1 and told == [(i, len(told)) for i in range(len(told))]


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request((1, 2), 0), r"requests\[1\].start must be in \[1, 2\], the number of ids, got 0"),
        (Request((1, 2), 3), r"requests\[1\].start must be in \[1, 2\], the number of ids, got 3"),
        (Request((), 1), r"requests\[1\].start must be in \[1, 0\], the number of ids, got 1"),
        (Request((1, 320), 1), r"requests\[1\].ids must be in \[0, 320\), got 320"),
        (Request((1,) * 258, 1), r"requests\[1\].ids must be at most 257 \(the positions, and"),
    ],
)
def test_refusals(request_, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(body(), [Request((1, 2), 1), request_])


def test_rows_that_would_not_fit_one_cache_are_computed_apart():
    """A long context with a short choice beside a short one with a long choice."""
    long, short = (1, *draw(0, 199)), (1, *draw(1, 9))
    requests = [Request(long + draw(2 + i, 40), 200) for i in range(2)]
    requests += [Request(short + draw(8 + i, 150), 10) for i in range(2)]
    model = body()
    expected = [alone(model, request) for request in requests]
    got = log_likelihoods(model, requests, budget=2000)
    assert all(abs(a.logprob - b.logprob) < CLOSE for a, b in zip(got, expected, strict=True))
