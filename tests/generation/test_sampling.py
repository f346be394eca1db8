"""Sampling against the plain formulas, token by token, and the generators of rows."""

import math

import numpy as np
import pytest
import torch

from elmkernels.generation.sampling import (
    Sampler,
    Sampling,
    argmax,
    check_choices,
    draw,
    penalize,
    warp,
)

VOCAB = 700  # more than the candidates that top_p looks at first


def logits_of(rows: int = 4, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * scale


def kept(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> set[int]:
    """The tokens that remain, by the definitions, in Python's float64."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if top_k is not None:
        least = row[order[min(top_k, len(row)) - 1]]
        order = [i for i in order if row[i] >= least]
    weights = [math.exp((row[i] - row[order[0]]) / temperature) for i in order]
    total, mass, remain = sum(weights), 0.0, set()
    for i, weight in zip(order, weights, strict=True):
        if top_p not in (None, 1.0) and mass / total >= top_p:
            break
        remain.add(i)
        mass += weight
    return remain


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(None, None), (1, None), (40, None), (VOCAB + 9, None), (None, 0.6), (None, 1.0), (30, 0.8)],
)
@pytest.mark.parametrize("scale", [3.0, 0.01])  # the second needs every candidate for top_p
def test_what_remains(temperature, top_k, top_p, scale):
    logits = logits_of(scale=scale)
    got = warp(logits, temperature, top_k, top_p)
    for row, warped in zip(logits.tolist(), got, strict=True):
        remain = kept(row, temperature, top_k, top_p)
        assert set(warped.isfinite().nonzero()[:, 0].tolist()) == remain
        order = sorted(remain)
        expected = torch.tensor([row[i] / temperature for i in order], dtype=torch.float64)
        torch.testing.assert_close(
            warped[order].double().softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-8
        )


def test_top_k_keeps_ties_and_top_p_keeps_one():
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]])
    assert warp(logits, 1.0, 2, None).isfinite().tolist() == [[False, True, True, True, False]]
    assert warp(logits, 1.0, None, 1e-9).isfinite().sum() == 1
    exact = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert warp(exact, 1.0, None, 0.6).isfinite().tolist() == [[True, True, False, False]]


def test_penalty():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]
    sampler = Sampler(Sampling(repetition_penalty=1e9), [[2]], 4, torch.device("cpu"), 9)
    # Each choice is held from then on, and no choice comes twice while another is left.
    chosen = [sampler(torch.tensor([[4.0, 3.0, 5.0, 2.0]])).item() for _ in range(3)]
    assert chosen == [0, 1, 3]


def test_greedy_is_the_largest_and_no_temperature_is_too_small():
    logits = logits_of()
    sampler = Sampler(Sampling(), [[0]] * 4, VOCAB, logits.device, 20)
    assert torch.equal(sampler(logits), logits.argmax(-1))
    sampler = Sampler(Sampling(temperature=1e-30), [[0]] * 4, VOCAB, logits.device, 20)
    assert torch.equal(sampler(logits), logits.argmax(-1))


def test_draws_follow_the_probabilities():
    """Chi-squared over 8 tokens: 7 degrees of freedom exceed 29.9 once in 10,000 seeds."""
    probabilities = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.02, 0.0])
    n = 20_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = draw(probabilities.log().expand(n, -1), uniform)
    counts = tokens.bincount(minlength=8).double()
    assert counts[7] == 0
    expected = n * probabilities[:7].double() / probabilities.double().sum()
    assert ((counts[:7] - expected).square() / expected).sum() < 29.9


def test_a_draw_is_the_inverse_of_the_cumulated_probabilities():
    logits = logits_of(rows=1, scale=1.0)
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = draw(logits.expand(50, -1), uniform).tolist()
    sums = logits[0].double().softmax(-1).cumsum(-1).tolist()
    for u, token in zip(uniform.tolist(), tokens, strict=True):
        assert token == next(i for i, s in enumerate(sums) if s > u * sums[-1])
    assert len(set(tokens)) > 10


def test_one_number_a_choice_from_the_generator_of_the_row():
    """However many choices there may be: the numbers of all are those of one at a time."""
    logits = logits_of(rows=1)
    generator = torch.Generator().manual_seed(5)
    sampler = Sampler(Sampling(temperature=1.0, seed=5), [[0]], VOCAB, logits.device, 20)
    for _ in range(20):
        u = torch.rand(1, dtype=torch.float64, generator=generator)
        assert torch.equal(sampler(logits), draw(warp(logits, 1.0, None, None), u))


def test_a_sampler_goes_on_as_another_at_its_own_addresses():
    logits, device = logits_of(), torch.device("cpu")
    held = [[1], [2], [3], [4]]

    def sampler(seed, steps):
        sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=seed)
        return Sampler(sampling, held, VOCAB, device, steps)

    other, expected, kept = sampler(7, 6), sampler(7, 6), sampler(1, 9)
    addresses = [t.data_ptr() for t in (kept.count, kept.uniforms, kept.seen)]
    other(logits), expected(logits), kept(logits), kept(logits)
    kept.take(other)
    assert kept.form == other.form
    for _ in range(5):
        assert torch.equal(kept(logits), expected(logits))
    assert [t.data_ptr() for t in (kept.count, kept.uniforms, kept.seen)] == addresses


def test_rows_draw_alone():
    """A row's tokens depend on its seed and logits, not on its neighbours."""
    logits = logits_of()
    sampling = Sampling(temperature=1.5, seed=[7, 8, 7, 9])
    together = Sampler(sampling, [[0]] * 4, VOCAB, logits.device, 20)
    tokens = torch.stack([together(logits) for _ in range(20)], dim=1)
    for row, seed in enumerate(sampling.seed):
        alone = Sampler(Sampling(temperature=1.5, seed=seed), [[0]], VOCAB, logits.device, 20)
        got = [alone(logits[row : row + 1]).item() for _ in range(20)]
        assert got == tokens[row].tolist()
    same = Sampler(Sampling(temperature=1.5, seed=7), [[0]] * 4, VOCAB, logits.device, 20)
    assert torch.equal(same(logits[:1].expand(4, -1))[0], tokens[0, 0])


def test_without_a_seed_every_sampler_is_another():
    logits = torch.zeros(1, VOCAB)
    rows = []
    for _ in range(2):
        sampler = Sampler(Sampling(temperature=1.0), [[0]], VOCAB, logits.device, 20)
        rows.append([sampler(logits).item() for _ in range(20)])
    assert rows[0] != rows[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be at least 0 .*got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be at least 0 .*got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"top_k": 2.0}, ValueError, "top_k must be a positive integer, got 2.0"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be positive .*got 0.0"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        Sampling(**options)


def test_wrong_seeds_and_logits():
    with pytest.raises(ValueError, match=r"one for each of 2 rows, got \[1\]"):
        Sampling(seed=[1]).generators(2)
    logits = torch.tensor([[0.0, 0.0], [0.0, math.nan]])
    assert draw(logits, torch.tensor([0.7, 0.7], dtype=torch.float64)).tolist() == [1, -1]


@pytest.mark.parametrize("temperature", [1e-46, 1e-300, 1e-38, np.float64(1e-50), 5e-324])
def test_a_temperature_that_float32_does_not_hold_is_greedy(temperature):
    logits = logits_of()
    sampling = Sampling(temperature=temperature, seed=0, top_k=3)
    assert sampling.temperature == 0
    sampler = Sampler(sampling, [[0]] * 4, VOCAB, logits.device, 20)
    assert torch.equal(sampler(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}, {"temperature": 0.5, "top_k": 5}]
    + [{"temperature": 1.0, "top_p": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("where", [[0], [VOCAB - 1], list(range(VOCAB))], ids=len)
def test_no_token_is_chosen_from_nan(options, where):
    """Greedy or drawn, whether one logit is NaN or all: -1 for that row alone."""
    logits = logits_of()
    logits[2, where] = math.nan
    sampler = Sampler(Sampling(seed=0, **options), [[0]] * 4, VOCAB, logits.device, 20)
    tokens = sampler(logits).tolist()
    assert tokens[2] == -1 and min(tokens[:2] + tokens[3:]) >= 0
    with pytest.raises(
        ValueError, match="logits must be numbers to choose a token, got NaN in row 2"
    ):
        check_choices(tokens)
    check_choices(tokens, [0, 1, 3])


@pytest.mark.parametrize(
    "seed",
    [np.int64(7), np.uint8(7), 7, [7], (np.int32(7),), np.array([7]), torch.tensor([7])],
    ids=repr,
)
def test_seeds_are_any_integers(seed):
    logits = logits_of(rows=1)
    sampler = Sampler(Sampling(temperature=1.0, seed=seed), [[0]], VOCAB, logits.device, 20)
    same = Sampler(Sampling(temperature=1.0, seed=7), [[0]], VOCAB, logits.device, 20)
    assert [sampler(logits).item() for _ in range(9)] == [same(logits).item() for _ in range(9)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"temperature": math.nan},
            ValueError,
            "temperature must be at least 0 and finite, got nan",
        ),
        (
            {"temperature": math.inf},
            ValueError,
            "temperature must be at least 0 and finite, got inf",
        ),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": True}, TypeError, "temperature must be a number, got True"),
        ({"top_p": math.nan}, ValueError, r"top_p must lie in \(0, 1\], got nan"),
        ({"top_p": -0.5}, ValueError, r"top_p must lie in \(0, 1\], got -0.5"),
        ({"top_k": 1.0}, ValueError, "top_k must be a positive integer, got 1.0"),
        ({"top_k": True}, ValueError, "top_k must be a positive integer, got True"),
        (
            {"repetition_penalty": 1e-46},
            ValueError,
            "repetition_penalty must be positive and finite",
        ),
        (
            {"repetition_penalty": 1e39},
            ValueError,
            "repetition_penalty must be positive and finite",
        ),
        ({"repetition_penalty": math.nan}, ValueError, "repetition_penalty must be positive"),
        ({"seed": 1.5}, TypeError, "seed must be None, an integer or one for each row, got 1.5"),
        ({"seed": "12"}, TypeError, "seed must be None, an integer or one for each row, got '12'"),
        ({"seed": [1, 2.0]}, TypeError, "seed must be None, an integer or one for each row"),
        ({"seed": True}, TypeError, "seed must be None, an integer or one for each row, got True"),
        ({"seed": 2**64}, ValueError, r"seed must be at least -2\^63 and less than 2\^64"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Sampling(**options)


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.9}, {"top_k": 1, "top_p": 1.0}])
@pytest.mark.parametrize("temperature", [{}, {"temperature": 0}, {"temperature": -0.0}])
def test_what_has_no_effect_at_temperature_0_is_refused(options, temperature):
    name = next(iter(options))
    said = f"{name} must be None at temperature 0, which takes the likeliest token, got "
    with pytest.raises(ValueError, match=said):
        Sampling(**options, **temperature)
    assert Sampling(**options, temperature=0.5).top_k == options.get("top_k")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("odd", [None, float("nan"), float("-inf"), float("inf")])
def test_argmax_is_that_of_torch(dtype, odd):
    """The first of many that are equal, of NaN or of infinities."""
    torch.manual_seed(0)
    for size in (1, 2, 31, 500):
        logits = torch.randint(-3, 3, (4, size)).to(dtype)
        if odd is not None:
            logits[torch.rand(logits.shape) < 0.1] = odd
            logits[3] = odd
        assert torch.equal(argmax(logits), logits.argmax(-1))
