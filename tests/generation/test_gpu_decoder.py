"""Decoding as it is done on a GPU, on a CPU: the same steps called one by one, or from a tape that
replays them as a CUDA graph does. What is expected is what calls that wait for each token give.
"""

import importlib
from functools import partial

import pytest
import torch
from helpers.tape import record

from elmkernels import OpenELM, OpenELMConfig, accelerate, pack, quantize, restore
from elmkernels.acceleration.decode_modes import CALLS, GRAPH, ONE_LAUNCH, missing
from elmkernels.generation import gpu_decoder
from elmkernels.generation.gpu_decoder import AHEAD, Decoder
from elmkernels.generation.sampling import Sampler, Sampling
from elmkernels.gpu_check.models import TINY
from elmkernels.openelm import KVCache, Session, stream

module = importlib.import_module("elmkernels.generation.session")
CONFIG = OpenELMConfig.from_name("OpenELM-270M", **TINY)
RAGGED = [[5, 9, 2], list(range(40, 60)), [7]]
LONG = list(range(250))  # the first steps after it are across the border of a bucket
SAMPLED = {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 4}


@pytest.fixture
def model() -> OpenELM:
    model = OpenELM.from_config(CONFIG, seed=3).eval()
    accelerate(model, prepack=False)  # nothing is prepacked on a GPU
    return model


@pytest.fixture(params=["called", "replayed"])
def device(request, monkeypatch):
    """Sessions decode as on a GPU."""
    monkeypatch.setattr(module, "wanted", lambda model, cache: True)
    monkeypatch.setattr(module, "Decoder", partial(Decoder, captured=False))
    monkeypatch.setattr(gpu_decoder, "_MEASURED", {})
    if request.param == "replayed":
        captured = lambda self, body: record(body, self._restorer())  # noqa: E731
        monkeypatch.setattr(Decoder, "_captured", captured)


every_way = pytest.mark.parametrize("mode", [ONE_LAUNCH, GRAPH, None])


def rows_of(model, prompts, steps, mode, **options):
    session = Session(model, len(prompts), 400, decode_mode=mode)
    return session.generate(prompts, steps, **options)


@every_way
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompts", [RAGGED, [LONG], [LONG[:100], LONG[::-1]]], ids=len)
def test_the_same_tokens_as_by_calls(model, device, mode, options, prompts):
    expected = rows_of(model, prompts, 12, CALLS, **options)
    assert rows_of(model, prompts, 12, mode, **options) == expected


@every_way
def test_a_session_goes_on_with_what_it_captured(model, device, mode):
    """Another sampling, the prompt's own prefix, stop tokens, an end before the last step."""
    plain, session = (
        Session(model, 2, 300, decode_mode=CALLS),
        Session(model, 2, 300, decode_mode=mode),
    )
    first = plain.generate([[1, 2, 3], [4, 5]], 9)
    stop = first[0].tokens[4]
    calls = 2 * [
        ([[1, 2, 3], [4, 5]], 9, {}),
        ([[1, 2, 3, *first[0].tokens], [4, 5, 6]], 20, {"stop_tokens": stop}),
        ([[1, 2, 3], [4, 5]], 9, SAMPLED),
        ([[8] * 140, [4, 5]], 9, SAMPLED | {"seed": 6}),
        ([[1, 2, 3], [4, 5]], 9, {"stop_tokens": stop}),
    ]
    for prompts, steps, options in calls:
        assert session.generate(prompts, steps, **options) == plain.generate(
            prompts, steps, **options
        )
        assert session.cache.rows == plain.cache.rows
        assert session.ids == plain.ids


@every_way
@pytest.mark.parametrize("form", ["packed12", "int8", "int4"])
def test_compressed_weights(device, mode, form):
    model = OpenELM.from_config(CONFIG, seed=3, dtype=torch.bfloat16).eval()
    pack(model) if form == "packed12" else quantize(model, bits=int(form[3:]))
    expected = rows_of(model, RAGGED, 8, CALLS)
    got = rows_of(model, RAGGED, 8, mode)
    # Sums in another order change bfloat16 logits by a rounding, and a near tie with it.
    same = sum(a.tokens == b.tokens for a, b in zip(got, expected, strict=True))
    assert same == 3 if mode == ONE_LAUNCH else same >= 1


def test_what_was_captured(model, device):
    session = Session(model, 1, 400, decode_mode=GRAPH)
    session.generate([LONG], 12)
    decoder = session.decoder()
    assert decoder.captures == [(GRAPH, 256), (GRAPH, 400)]
    for _ in range(2):
        session.generate([[1, 2, 3]], 4)
        session.reset()
    session.generate([[3, 2, 1] * 6], 4, temperature=1.0)
    session.reset()
    session.generate([[3, 2, 1] * 6], 4, temperature=1.0)
    assert set(decoder.captures) == {(16, 256), (32, 256), (GRAPH, 256)}
    assert decoder.taken == {256: GRAPH, 400: GRAPH}
    assert session.memory == {"cache": session.cache.nbytes, "graphs": 0}
    session = Session(model, 1, 400, decode_mode=ONE_LAUNCH)
    session.generate([LONG], 12)
    assert session.decoder().captures == [(ONE_LAUNCH, None)]


def test_a_model_that_changed_is_captured_anew(device):
    model = OpenELM.from_config(CONFIG, seed=3, dtype=torch.bfloat16).eval()
    session = Session(model, 1, 300)
    for _ in range(3):
        session.generate([[1, 2]], 3)
    before = session.decoder()._replays.copy()
    session.generate([[1, 2]], 3)
    assert session.decoder()._replays == before
    pack(model)
    session.generate([[1, 2]], 3)
    assert not set(session.decoder()._replays.values()) & set(before.values())


@pytest.mark.parametrize("fastest", [ONE_LAUNCH, GRAPH])
def test_the_faster_way_is_measured_once(model, device, monkeypatch, fastest):
    asked = []

    def timed(replay, device):
        asked.append(replay)
        replay()
        return 1.0 if (len(asked) % 2 == 1) == (fastest == ONE_LAUNCH) else 2.0

    monkeypatch.setattr(gpu_decoder, "_timed", timed)
    expected = rows_of(model, [[1, 2, 3]], 6, CALLS)
    for _ in range(2):
        session = Session(model, 1, 200)
        assert session.generate([[1, 2, 3]], 6) == expected
        assert session.decoder().taken == {200: fastest}
        assert len(asked) == 2 * gpu_decoder.ROUNDS


@pytest.mark.parametrize("failing", [{ONE_LAUNCH}, {GRAPH}, {ONE_LAUNCH, GRAPH}])
def test_a_capture_that_fails(model, device, monkeypatch, failing):
    """What is left decodes; a mode that was named doesn't fall back."""
    made = Decoder._captured

    def captured(self, body):
        mode = {"one_launch": ONE_LAUNCH, "body": GRAPH}[body.__name__]
        if mode in failing and not body.__qualname__.startswith("Decoder.prefill"):
            raise torch.OutOfMemoryError("no memory for it\nmore")
        return made(self, body)

    monkeypatch.setattr(Decoder, "_captured", captured)
    expected = rows_of(model, [[1, 2, 3]], 6, CALLS)
    session = Session(model, 1, 200)
    assert session.generate([[1, 2, 3]], 6) == expected
    left = [mode for mode in (ONE_LAUNCH, GRAPH) if mode not in failing]
    assert session.decoder().taken == {200: left[0] if left else CALLS}
    assert set(session.decoder().refused) == failing
    named = sorted(failing)[0]
    message = f"{named}.* is not possible: its capture failed: no mem"
    with pytest.raises(RuntimeError, match=message):
        rows_of(model, [[1, 2, 3]], 6, named)


def test_steps_run_ahead_of_what_is_read(model, device, monkeypatch):
    launched = []
    launch = Decoder._launch
    counted = lambda self, *a, **k: (launched.append(1), launch(self, *a, **k))  # noqa: E731
    monkeypatch.setattr(Decoder, "_launch", counted)
    session = Session(model, 1, 200)
    run = session.stream([[1, 2, 3]], 30)
    next(run)
    assert len(launched) == AHEAD - 1 and session.cache.rows == [3]
    next(run)
    assert len(launched) == AHEAD and session.cache.rows == [4]
    run.interrupt()
    assert session.cache.rows == [4]
    expected = rows_of(model, [[1, 2, 3]], 30, CALLS)
    assert session.generate([[1, 2, 3]], 30) == expected


def test_an_interruption_of_a_launch_loses_nothing(model, device, monkeypatch):
    launch, left = Decoder._launch, [12]

    def interrupted(self, *a, **k):
        left[0] -= 1
        launch(self, *a, **k)
        if not left[0]:
            raise KeyboardInterrupt

    expected = rows_of(model, [[1, 2, 3]], 30, CALLS)
    monkeypatch.setattr(Decoder, "_launch", interrupted)
    session = Session(model, 1, 200)
    (row,) = session.generate([[1, 2, 3]], 30)
    assert (
        row.finish_reason == "interrupted" and row.tokens == expected[0].tokens[: len(row.tokens)]
    )
    assert len(row.tokens) == 12 - AHEAD + 1
    assert session.generate([[1, 2, 3]], 30) == expected


def test_logits_that_are_no_numbers(model, device):
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    run = Session(model, 1, 100).stream([[1, 2, 3]], 30, temperature=1.0)
    with pytest.raises(ValueError, match="got NaN"):
        list(run)
    assert run.rows[0].finish_reason == "failed"


@torch.inference_mode()
@every_way
def test_all_steps_at_once(model, device, mode):
    cache = KVCache(CONFIG, 2, 300)
    decoder = Decoder(model, cache, mode, captured=False)
    ids = torch.arange(40).view(2, 20)
    logits = model(ids, cache=cache, logits_to_keep=1)[:, -1]
    sampler = Sampler(Sampling(), [[]] * 2, CONFIG.vocab_size, cache.device, 9)
    expected = rows_of(model, ids.tolist(), 9, CALLS)
    for read in (0, 3):
        cache.truncate(20)
        decoder.begin(logits, sampler, 9)
        for i in range(read):
            assert decoder.next_tokens() == [row.tokens[i] for row in expected]
        assert decoder.rest().tolist() == [row.tokens for row in expected]
        assert cache.rows == [28, 28]


def test_no_room_for_the_padding_of_a_prompt(model, device):
    """The prompt then goes as it is."""
    expected = rows_of(model, [[1] * 20], 3, CALLS)
    session = Session(model, 1, 24)
    assert session.generate([[1] * 20], 3) == expected
    assert not any(isinstance(key[0], int) for key in session.decoder().captures)


def test_what_cannot_be_had(model):
    with pytest.raises(RuntimeError, match="'graph' needs a CUDA device, the model is on cpu"):
        Session(model, decode_mode=GRAPH)
    with pytest.raises(ValueError, match="decode_mode must be one of .*, got 'magic'"):
        stream(model, [[1]], 3, decode_mode="magic")
    assert Session(model, decode_mode=CALLS).decoder() is None
    assert Session(model).decoder() is None
    cache = KVCache(CONFIG, 9, 20)
    assert missing(ONE_LAUNCH, model, cache) == "decode_step takes at most 8 sequences, got 9"
    assert missing(GRAPH, model, cache) is None
    cache = KVCache(CONFIG, 1, 20, dtype=torch.bfloat16)
    assert "the weights must be torch.bfloat16 like the cache" in missing(GRAPH, model, cache)
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    cache = KVCache(CONFIG, 1, 20)
    assert "layers.0 has hooks" in missing(GRAPH, model, cache)
    with pytest.raises(RuntimeError, match="'graph' is not possible: .*hooks.*; 'calls' is"):
        Decoder(model, cache, GRAPH, captured=False)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert missing(GRAPH, model, cache) == "autocast is on"
    restore(model)
    accelerate(model, backend="reference")
    assert "decode_step has no kernel here" in missing(ONE_LAUNCH, model, cache)


@every_way
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_nan_is_an_error_and_no_token(model, device, mode, options):
    """Of all logits, or of one alone, from the first step on and from a later one."""
    session = Session(model, 2, 200, decode_mode=mode)
    session.generate([[1, 2, 3], [4, 5]], 4, stop_tokens=(), **options)
    with torch.no_grad():
        model.token_embeddings.weight[-1] = float("nan")  # the head's last row
    with pytest.raises(
        ValueError, match="logits must be numbers to choose a token, got NaN in row"
    ):
        session.generate([[1, 2, 3, 6], [4, 5, 7]], 4, stop_tokens=(), **options)
