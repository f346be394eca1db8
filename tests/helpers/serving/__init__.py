"""vLLM's engine and server as tests use them: each in a process of its own, on small folders."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from elmkernels import OpenELM, OpenELMConfig
from helpers.tokenizers import hugging_face

ENGINE = Path(__file__).with_name("engine.py")
# vLLM's attention on a CPU takes heads of 32, 64, ...; 290 tokens are the test tokenizer's.
SHAPE: dict[str, Any] = dict(
    num_transformer_layers=4, model_dim=128, head_dim=32, num_gqa_groups=2, ffn_dim_divisor=32,
    ffn_multipliers=(0.5, 2.0), normalize_qk_projections=True, share_input_output_layers=True,
    vocab_size=290, rope_max_length=256, max_context_length=128,
)  # fmt: skip
LAYERWISE = OpenELMConfig(
    **SHAPE, num_query_heads=(2, 4, 6, 6), num_kv_heads=(1, 2, 3, 3), qkv_multipliers=1.0
)
EVEN = OpenELMConfig(
    **SHAPE, num_query_heads=(2, 4, 4, 8), num_kv_heads=(1, 2, 2, 4), qkv_multipliers=1.0
)
UNTIED = OpenELMConfig(
    **SHAPE | {"share_input_output_layers": False, "normalize_qk_projections": False},
    qkv_multipliers=(0.5, 1.0),
)
NO_GLU = OpenELMConfig(**SHAPE | {"ffn_with_glu": False}, qkv_multipliers=(0.5, 1.0))
PROMPTS = [[1, 5, 9 + i, 7 * i + 3, *range(20, 20 + 3 * i)] for i in range(6)]
WAIT = 150.0  # seconds that an engine may take to start on two busy cores


def environment() -> dict[str, str]:
    """Of a process that runs vLLM: any core, no network."""
    return os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def save(config: OpenELMConfig, folder: Path, tokenizer: bool = True) -> OpenELM:
    """A folder as `vllm serve` takes it; gives the model in it, float32."""
    model = OpenELM(config, seed=3)
    with torch.no_grad():  # of random weights the embedding of the last token would win always
        for layer in model.layers:
            layer.attn.out_proj.weight *= 8
            layer.ffn.proj_2.weight *= 8
    model.save_pretrained(folder)
    if tokenizer:
        hugging_face(folder)
        said = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "model_max_length": 128,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return model


@torch.no_grad()
def greedy(model: OpenELM, prompt: list[int], new: int) -> list[int]:
    """What the reference goes on with."""
    ids = torch.tensor([prompt])
    for _ in range(new):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


def run_engine(folder: Path, jobs: list[dict], timeout: float = WAIT, **options: Any) -> Any:
    """What an engine with these options answers to each job, and what it logged: (answers, log).

    Args:
        folder: the model.
        jobs: {"prompts", "sampling", ...}, see engine.py.
        options: of `vllm.LLM`.
    """
    said = json.dumps({"model": str(folder), "options": options, "jobs": jobs})
    command = [sys.executable, str(ENGINE)]
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=timeout, env=environment()
    )
    log = done.stdout + done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER ")), log
    return None, log


class Server:
    """`vllm serve` of a folder on loopback; everything that it started ends with it."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        command = [
            # What `vllm serve` runs; that command wants a distribution called vllm, not vllm-cpu.
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "m",
            "--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 26), *options,
        ]  # fmt: skip
        self.log = log
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(),
                start_new_session=True,
            )  # fmt: skip

    def wait(self, timeout: float = WAIT) -> None:
        """Until it answers; raises with its log's end if it doesn't."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/health")[0] == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the server didn't start: {self.log.read_text()[-3000:]}")

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 60) -> tuple[int, str]:
        """(status, text) of one request; body: JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def complete(self, prompt: Any, new: int = 8, **more: Any) -> dict:
        """What /v1/completions gives, greedy if nothing else is said."""
        asked = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0,
                 "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        status, text = self.ask("POST", "/v1/completions", asked | more)
        assert status == 200, text
        return json.loads(text)["choices"][0]

    def children(self, name: str) -> list[int]:
        """The processes of this server that are called so."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(fields[3]) == self.process.pid and name in words:
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)


@contextlib.contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """A server that answers."""
    server = Server(folder, log, *options)
    try:
        server.wait()
        yield server
    finally:
        server.end()
