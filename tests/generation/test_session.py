"""Generation: golden tokens, ragged batches, chunks, reused prefixes, interruptions, errors."""

import copy

import pytest
import torch
from helpers.checkpoints import CONFIG
from helpers.golden import load_hf_tiny

from elmkernels.openelm import (
    KVCache,
    OpenELM,
    Row,
    Session,
    accelerate,
    generate,
    greedy,
    stream,
)

RAGGED = [[5, 4, 3, 2, 1], [7] * 17, [300], [9, 8, 7]]
SAMPLED = {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "repetition_penalty": 1.2}


@pytest.fixture(params=["eager", "accelerated"])
def model(request) -> OpenELM:
    model = load_hf_tiny().model()
    if request.param == "accelerated":
        accelerate(model)
    return model


@pytest.fixture
def small() -> OpenELM:
    return OpenELM(CONFIG, seed=3)


def tokens_of(rows: list[Row]) -> list[list[int]]:
    return [row.tokens for row in rows]


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_golden_tokens(model, hf_tiny, chunk):
    golden = hf_tiny.tensors["greedy_9_plus_24"]
    (row,) = generate(model, golden[:, :9], 24, chunk=chunk)
    assert row == Row(golden[0, 9:].tolist(), "length")


@pytest.mark.parametrize("chunk", [3, 512])
def test_golden_padded_batch(model, hf_tiny, chunk):
    """What a left-padded batch gave, from the same prompts without their padding."""
    t = hf_tiny.tensors
    ids, mask, golden = t["padded_ids"], t["padded_mask"].bool(), t["padded_greedy"]
    prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    assert len({len(p) for p in prompts}) > 1
    rows = generate(model, prompts, golden.shape[1] - ids.shape[1], chunk=chunk)
    assert tokens_of(rows) == golden[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("options", [{}, SAMPLED | {"seed": 11}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [2, 512])
def test_a_ragged_batch_is_each_row_alone(model, options, chunk):
    rows = generate(model, RAGGED, 12, chunk=chunk, **options)
    for b, prompt in enumerate(RAGGED):
        own = dict(options, seed=11 + b) if options else {}
        assert generate(model, [prompt], 12, **own) == rows[b : b + 1]


def test_a_padded_pass_gives_the_logits_of_each_row(small):
    """Passes of different counts through one ragged cache, in float64, against one pass a row."""
    model, length = small.double(), 9
    ids = torch.randint(0, 96, (3, length), generator=torch.Generator().manual_seed(0))
    cache = KVCache(CONFIG, 3, length + 3, dtype=torch.float64)
    chunks = [[4, 1, 0], [2, 3, 4], [0, 0, 1], [3, 1, 2]]
    with torch.inference_mode():
        whole = model(ids)
        for counts in chunks:
            width = max(counts)
            starts = cache.rows
            parts = torch.full((3, width), 95)
            for b, (start, n) in enumerate(zip(starts, counts, strict=True)):
                parts[b, :n] = ids[b, start : start + n]
            every = model(parts, cache=copy.deepcopy(cache), counts=counts)
            last = model(parts, cache=cache, counts=counts, logits_to_keep=1)
            assert every.shape[1] == width and last.shape[1] == 1
            for b, (start, n) in enumerate(zip(starts, counts, strict=True)):
                torch.testing.assert_close(every[b, :n], whole[b, start : start + n])
                if n:
                    torch.testing.assert_close(last[b, 0], whole[b, start + n - 1])
            assert cache.rows == [s + n for s, n in zip(starts, counts, strict=True)]
    assert cache.ragged and cache.lengths.tolist() == [9, 5, 7]


def test_chunks_bound_what_a_prompt_takes(small):
    """No pass over a prompt is longer than a chunk."""
    lengths = []
    small.layers[0].register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    expected = tokens_of(generate(small, [[1] * 30, [2] * 25], 4))
    assert lengths == [30, 1, 1, 1]
    lengths.clear()
    assert tokens_of(generate(small, [[1] * 30, [2] * 25], 4, chunk=8)) == expected
    assert lengths == [8, 8, 8, 6, 1, 1, 1]


def test_seeds(model):
    def run(seed, **options):
        return tokens_of(
            generate(model, [[1, 2, 3]] * 2, 16, temperature=1.0, seed=seed, **options)
        )

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(5)[1] == run(6)[0] == run([0, 6])[1], "row b draws from seed + b"
    assert run(5)[0] != run(5)[1]
    assert run(None) != run(None)
    assert run(5, top_k=1)[0] == generate(model, [[1, 2, 3]], 16)[0].tokens


def test_stop_tokens(model):
    free = tokens_of(generate(model, RAGGED, 12))
    stop = free[1][4]
    rows = generate(model, RAGGED, 12, stop_tokens=[stop, 319])
    for row, tokens in zip(rows, free, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in (stop, 319)]
        if ends:
            assert row == Row(tokens[: ends[0]], "stop", tokens[ends[0]])
        else:
            assert row == Row(tokens, "length")
    assert rows[1].finish_reason == "stop" and any(row.finish_reason == "length" for row in rows)
    assert generate(model, RAGGED[1:2], 12, stop_tokens=stop) == rows[1:2]


def test_a_stream_is_silent_where_rows_have_stopped(model):
    free = tokens_of(generate(model, RAGGED, 8))
    stop = free[0][3]
    steps = []
    run = stream(model, RAGGED, 8, stop_tokens=stop)
    for step in run:
        steps.append(step)
    assert run.rows == generate(model, RAGGED, 8, stop_tokens=stop)
    for b, row in enumerate(run.rows):
        column = [step[b] for step in steps]
        assert column == row.tokens + [None] * (len(steps) - len(row.tokens))
    assert list(run) == []


def test_it_ends_when_every_row_has_stopped(model):
    first = generate(model, [[1, 2]], 1)[0].tokens[0]
    passes = []
    handle = model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    rows = generate(model, [[1, 2]] * 2, 50, stop_tokens=first)
    handle.remove()
    assert rows == [Row([], "stop", first)] * 2
    assert len(passes) == 1


def test_a_session_reuses_the_common_prefix(model):
    session = Session(model, 2)
    first = [[5, 6, 7, 8], [9, 10]]
    rows = session.generate(first, 5)
    assert rows == generate(model, first, 5)
    # The next turn of a conversation, and one that leaves the path in its middle.
    second = [first[0] + rows[0].tokens + [44, 45], first[1] + rows[1].tokens[:2] + [46]]
    run = session.stream(second, 6)
    assert run.reused == [8, 4]  # the last token of a turn has not been through the model
    list(run)
    assert run.rows == generate(model, second, 6)
    # The same prompt again: its last token gives the logits.
    run = session.stream(second, 6)
    assert run.reused == [len(prompt) - 1 for prompt in second]
    list(run)
    assert run.rows == generate(model, second, 6)
    session.reset()
    assert session.stream(second, 0).reused == [0, 0]


def test_a_session_after_a_stop_goes_on_right(model):
    prompts = [[5, 6, 7, 8], [9, 10]]
    free = generate(model, prompts, 10)
    session = Session(model, 2)
    rows = session.generate(prompts, 10, stop_tokens=free[0].tokens[2])
    assert len(rows[0].tokens) == 2 and len(rows[1].tokens) > 2
    assert session.cache.rows[0] <= 6 < session.cache.rows[1]
    again = [prompts[0] + [3, 4], prompts[1] + rows[1].tokens + [3]]
    assert session.generate(again, 4) == generate(model, again, 4)


def test_a_session_with_little_room_takes_narrow_chunks(small):
    """One row nearly full, the other new: padding has no room beside the first."""
    session = Session(small, 2, max_length=24)
    long = [1 + i for i in range(20)]
    session.generate([long, [1]], 2)
    prompts = [long + [90, 91], [50 + i for i in range(12)]]
    run = session.stream(prompts, 2)
    assert run.reused == [20, 0]
    list(run)
    assert run.rows == generate(small, prompts, 2)


class Interrupt:
    """Ctrl-C in the middle of a layer, at the `at`-th pass from now."""

    def __init__(self, model: OpenELM, at: int) -> None:
        self.left = at
        self.handle = model.layers[-1].register_forward_pre_hook(self)

    def __call__(self, *_):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_an_interruption_keeps_what_was_generated(model, at):
    free = tokens_of(generate(model, RAGGED[:2], 10))
    session = Session(model, 2)
    interrupt = Interrupt(model, at)
    rows = session.generate(RAGGED[:2], 10, chunk=9)
    interrupt.handle.remove()
    done = max(0, at - 1)  # the first two passes are chunks of the prompt
    assert rows == [Row(tokens[:done], "interrupted") for tokens in free]
    if at == 1:
        assert session.cache.rows == [5, 9]
    # What is in the cache is what its ids say: the same prompt goes on from there.
    assert tokens_of(session.generate(RAGGED[:2], 10)) == free


def test_an_interrupted_stream_ends(model):
    run = stream(model, [[1, 2, 3]], 10)
    interrupt = Interrupt(model, 3)
    assert len(list(run)) == 3
    interrupt.handle.remove()
    assert run.interrupted and run.rows[0].finish_reason == "interrupted"
    assert list(run) == []


def test_a_failed_pass_is_raised_and_loses_nothing(model):
    session = Session(model, 1)
    expected = session.generate([[1, 2, 3]], 6)

    def fail(*_):
        raise KeyError("broken")

    session.reset()
    run = session.stream([[1, 2, 3]], 6)
    next(run), next(run)
    handle = model.layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="broken"):
        next(run)
    handle.remove()
    assert run.rows == [Row(expected[0].tokens[:2], "failed")]
    assert session.cache.rows == [4]
    assert session.generate([[1, 2, 3]], 6) == expected


def test_an_overtaken_stream_does_not_go_on(small):
    session = Session(small, 1)
    first = session.stream([[1, 2]], 5)
    next(first)
    session.generate([[3, 4]], 2)
    with pytest.raises(RuntimeError, match="began another stream"):
        next(first)


def test_generation_keeps_its_mode_to_itself(small):
    run = stream(small, [[1, 2]], 3)
    next(run)
    assert not torch.is_inference_mode_enabled()
    assert small.token_embeddings.weight.requires_grad


def test_greedy_is_the_same(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert greedy(model, ids, 7).tolist() == tokens_of(generate(model, ids, 7, stop_tokens=()))


def test_autocast_and_compiled_models(small):
    expected = greedy(small, torch.tensor([[1, 2, 3]]), 4)
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    assert tokens_of(generate(compiled, [[1, 2, 3]], 4)) == expected.tolist()
    ragged = tokens_of(generate(small, [[1, 2, 3], [4]], 4))
    assert tokens_of(generate(compiled, [[1, 2, 3], [4]], 4)) == ragged
    with torch.autocast("cpu", torch.bfloat16):
        session = Session(small)
        assert session.cache.dtype == torch.bfloat16
        assert len(session.generate([[1, 2, 3]], 4)[0].tokens) == 4


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one prompt, got none"),
        ([[1], []], {}, ValueError, r"prompts\[1\] must hold at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, ValueError, "got an empty prompt"),
        ([[1, 96]], {}, ValueError, r"prompts\[0\] must hold ids in \[0, 96\), got 96"),
        ([[1], [-1]], {}, ValueError, r"prompts\[1\] must hold ids in \[0, 96\), got -1"),
        ([1, 2], {}, TypeError, r"prompts\[0\] must be a list of ids, got 1"),
        ([[1.5]], {}, TypeError, r"prompts\[0\] must be a list of ids, got \[1.5\]"),
        ("text", {}, TypeError, "prompts must be a tensor or a list, got str"),
        (torch.zeros(3), {}, ValueError, r"integers \[batch, length\].*got torch.float32 \[3\]"),
        ([[1] * 61], {}, ValueError, r"must fit 64 tokens \(rope_max_length\).*got 61 \+ 4"),
        ([[1]], {"n": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ([[1]], {"n": 2.0}, ValueError, "max_new_tokens must be at least 0, got 2.0"),
        ([[1]], {"chunk": 0}, ValueError, "chunk must be a positive integer, got 0"),
        ([[1]], {"stop_tokens": 96}, ValueError, r"stop_tokens must lie in \[0, 96\), got 96"),
        ([[1]], {"temperature": -1.0}, ValueError, "temperature .*got -1.0"),
        ([[1]], {"top_p": 0.0}, ValueError, "top_p .*got 0.0"),
        ([[1]], {"seed": [1, 2]}, ValueError, "one for each of 1 rows"),
    ],
)
def test_wrong_arguments(small, prompts, options, error, message):
    options = dict(options)
    with pytest.raises(error, match=message):
        generate(small, prompts, options.pop("n", 4), **options)


def test_a_refused_prompt_leaves_a_session_as_it_was(small):
    session = Session(small, 1, max_length=16)
    session.generate([[1, 2, 3]], 4)
    held, ids = session.cache.rows, session.ids
    for prompts, options, message in (
        ([[5] * 14], {}, r"must fit 16 tokens \(the cache's max_length\) together, got 14 \+ 4"),
        ([[1], [2]], {}, "prompts must be 1, as the session's batch, got 2"),
        ([[4]], {"top_k": -2}, "top_k must be a positive integer, got -2"),
    ):
        with pytest.raises(ValueError, match=message):
            session.generate(prompts, 4, **options)
        assert (session.cache.rows, session.ids) == (held, ids)
